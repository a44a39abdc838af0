"""The audit log: read by pages, and kept for as long as is wanted."""

from dataclasses import asdict

from services.provisioner.domain.audit import AuditEvent, AuditFilter
from services.provisioner.store.keyset import page
from services.provisioner.store.rows import load_sql
from services.shared.postgres import Connections

_SQL = load_sql("audit")
_DROP_BATCH = 1000

_AFTER_ALL = 2**63 - 1


class AuditStore:
    def __init__(self, database: Connections) -> None:
        self._database = database

    async def events(self, wanted: AuditFilter, *, before: int | None, limit: int) -> list[AuditEvent]:
        """Up to `limit` events, the latest first, from the last before the event with this id."""
        key = {"event_id": _AFTER_ALL if before is None else before}
        if wanted.user_id is None:
            columns = {"product_id": wanted.product_id, "action": wanted.action}
            within = {column: value for column, value in columns.items() if value is not None}
            sql, values = page(_SQL["events"], within, key, latest_first=True)
        else:
            sql, values = _SQL["events_of_user"], {**asdict(wanted), **key}
        async with self._database.connection() as connection:
            cursor = await connection.execute(sql, {**values, "limit": limit})
            return [AuditEvent(**row) for row in await cursor.fetchall()]

    async def make_partitions(self) -> list[str]:
        """Makes the months that are needed and not there; returns what was made.

        Raises:
            Unavailable: others were in the way for too long; nothing is made.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["make_partitions"])
            return [row["partition"] for row in await cursor.fetchall()]

    async def drop_partitions(self, kept_days: int) -> list[str]:
        """Drops the months that ended more than `kept_days` days ago; returns what was dropped.

        Raises:
            Unavailable: writers were in the way for too long; nothing is dropped.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["drop_partitions"], {"kept_days": kept_days})
            return [row["partition"] for row in await cursor.fetchall()]

    async def drop_operations(self, kept_days: int) -> None:
        """Drops operations that ended more than `kept_days` days ago, some at a time."""
        dropped = _DROP_BATCH
        while dropped == _DROP_BATCH:
            async with self._database.connection() as connection:
                cursor = await connection.execute(
                    _SQL["drop_operations"], {"kept_days": kept_days, "limit": _DROP_BATCH}
                )
                row = await cursor.fetchone()
            assert row is not None, "an aggregate has a row"
            dropped = row["dropped"]

    async def record_denials(self) -> None:
        """Makes an event of what was denied of each product, for each reason, in each minute that is over."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["record_denials"])
