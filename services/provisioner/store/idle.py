"""Engines that may be put to sleep."""

from uuid import UUID

from services.provisioner.domain.engine import Engine
from services.provisioner.store.rows import load_sql, to_engine
from services.shared.postgres import Connections

_ENGINES = load_sql("engines")


class IdleStore:
    """Args:
    database: the registry.
    node: whose engines.
    stale_ok_s: how long an Admission may go on without the registry, in seconds.
    """

    def __init__(self, database: Connections, *, node: str, stale_ok_s: float) -> None:
        self._database = database
        self._values = {"node": node, "stale_ok_s": stale_ok_s}

    async def idle_engines(self, limit: int) -> list[Engine]:
        """Running engines without a sign of work for as long as their product's policy says."""
        return await self._engines("idle_engines", limit=limit)

    async def light_sleepers(self, deep_sleep_after_s: float, limit: int) -> list[Engine]:
        """Frozen engines that have slept for longer than that."""
        return await self._engines("light_sleepers", deep_sleep_after_s=deep_sleep_after_s, limit=limit)

    async def mark_busy(self, engine_id: UUID, reason: str) -> None:
        """Notes a sign of work that the engine itself gave."""
        async with self._database.connection() as connection:
            await connection.execute(_ENGINES["mark_busy"], {"engine_id": engine_id, "reason": reason})

    async def _engines(self, query: str, **values: object) -> list[Engine]:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_ENGINES[query], {**self._values, **values})
            return [to_engine(row) for row in await cursor.fetchall()]
