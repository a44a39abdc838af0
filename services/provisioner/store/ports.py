"""Port leases of one node."""

from uuid import UUID

from services.provisioner.store.rows import load_sql
from services.shared.postgres import Connection

_SQL = load_sql("engines")


class PortAllocator:
    """Gives every engine of a node a port of its own.

    Args:
        node: whose ports.
        ports: which of them may be leased.
    """

    def __init__(self, node: str, ports: range) -> None:
        self._node = node
        self._range = {"node": node, "port_min": ports.start, "port_max": ports.stop - 1}

    async def lease(self, tx: Connection, engine_id: UUID) -> int | None:
        """Leases a free port to the engine within the transaction; None if none is left."""
        while True:
            cursor = await tx.execute(_SQL["free_port"], self._range)
            free = await cursor.fetchone()
            if free is None:
                return None
            lease = {"node": self._node, "port": free["port"], "engine_id": engine_id}
            cursor = await tx.execute(_SQL["lease_port"], lease)
            if await cursor.fetchone() is not None:
                return int(free["port"])

    async def set_aside(self, tx: Connection, port: int) -> None:
        """Leaves a port alone for a while that the host refuses though nobody leases it."""
        await tx.execute(_SQL["set_port_aside"], {"node": self._node, "port": port})
