"""Many engines at a glance: lists and counts; and how one engine is.

Where a product is named, nothing of another is ever read.
"""

from datetime import UTC, datetime
from typing import LiteralString
from uuid import UUID

from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.fleet import EngineReport, EngineSummary, PastHour, WarmPoolFill
from services.provisioner.store.keyset import page
from services.provisioner.store.rows import load_sql, to_status
from services.shared.postgres import Connections

_SQL = load_sql("fleet")

_BEFORE_ALL = (datetime.min.replace(tzinfo=UTC), UUID(int=0))
# A batch of so many takes a fraction of what a statement may.
_FOLD_BATCH = 100_000


class FleetStore:
    def __init__(self, database: Connections) -> None:
        self._database = database

    async def engines(
        self,
        product_id: UUID | None,
        status: EngineStatus | None,
        *,
        after: tuple[datetime, UUID] | None,
        offset: int,
        limit: int,
    ) -> list[EngineSummary]:
        """Engines, the oldest first.

        Args:
            product_id: only this product's; None for all.
            status: only those in it; None for all.
            after: the creation and id of the engine after which to begin.
            offset: how many to leave out there. Each is read all the same.
            limit: most to return.
        """
        wanted = {"product_id": product_id, "status": status}
        within = {column: value for column, value in wanted.items() if value is not None}
        created_at, engine_id = after or _BEFORE_ALL
        sql, values = page(_SQL["engines"], within, {"created_at": created_at, "engine_id": engine_id})
        async with self._database.connection() as connection:
            cursor = await connection.execute(sql, {**values, "offset": offset, "limit": limit})
            return [EngineSummary(**(row | {"status": to_status(row["status"])})) for row in await cursor.fetchall()]

    async def counts(self, product_id: UUID | None) -> dict[str, int]:
        """The counts of a product, or the sums over all, by name; see the table. A count may be missing for 0."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_scoped("counts", product_id), {"product_id": product_id})
            return {row["name"]: row["n"] for row in await cursor.fetchall()}

    async def warm_pool(self) -> WarmPoolFill:
        """The pools of all nodes together."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["warm_pool"])
            row = await cursor.fetchone()
            assert row is not None, "an aggregate has a row"
            return WarmPoolFill(**row)

    async def past_hour(self, product_id: UUID | None) -> PastHour:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_scoped("past_hour", product_id), {"product_id": product_id})
            row = await cursor.fetchone()
            assert row is not None, "an aggregate has a row"
            return PastHour(**row)

    async def report(self, product_id: UUID, user_id: str) -> EngineReport | None:
        """How the user's engine is and how that came about; None if there is no engine."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["engine_report"], {"product_id": product_id, "user_id": user_id})
            row = await cursor.fetchone()
            return None if row is None else EngineReport(**(row | {"status": to_status(row["status"])}))

    async def fold_counts(self) -> None:
        """Makes one row of all that belong to the same count, while others go on counting."""
        folded = _FOLD_BATCH
        while folded == _FOLD_BATCH:
            async with self._database.connection() as connection:
                cursor = await connection.execute(_SQL["fold_counts"], {"limit": _FOLD_BATCH})
                row = await cursor.fetchone()
            assert row is not None, "an aggregate has a row"
            folded = row["folded"]


def _scoped(name: str, product_id: UUID | None) -> LiteralString:
    return _SQL[name].format(scope="true" if product_id is None else "product_id = %(product_id)s")
