"""What the registry says of engines, to be compared with what exists."""

from collections.abc import Collection
from uuid import UUID

from services.provisioner.domain.registered import Registered
from services.provisioner.store.rows import load_sql
from services.shared.postgres import Connections

_ENGINES = load_sql("engines")
_RECONCILE = load_sql("reconcile")


class ReconcileStore:
    """Args:
    database: the registry.
    node: whose engines.
    """

    def __init__(self, database: Connections, *, node: str) -> None:
        self._database = database
        self._node = node

    async def registered(self, listed: Collection[UUID]) -> list[Registered]:
        """The node's engines that have an instance or should have one.

        Args:
            listed: those that have one.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                _RECONCILE["registered_engines"], {"node": self._node, "listed": list(listed)}
            )
            return [Registered(**row) for row in await cursor.fetchall()]

    async def unknown(self, engine_ids: Collection[UUID]) -> dict[UUID, bool]:
        """Those of the given engines that the registry does not know, on whatever node.

        Returns:
            For each, whether it is known that it was to be destroyed, with its data.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(_RECONCILE["unknown_engines"], {"engine_ids": list(engine_ids)})
            return {row["engine_id"]: row["destroyed"] for row in await cursor.fetchall()}

    async def set_deep_asleep(self, engine_id: UUID, deep_asleep: bool) -> None:
        """Writes how deep a sleeper sleeps, unless an operation has begun meanwhile."""
        values = {"engine_id": engine_id, "deep_asleep": deep_asleep}
        async with self._database.transaction() as tx:
            await tx.execute(_ENGINES["lock_engine"], values)
            await tx.execute(_RECONCILE["set_deep_asleep"], values)
