"""Leases of the loops that only one process runs at a time."""

from uuid import UUID

from services.provisioner.store.rows import load_sql
from services.shared.postgres import Database

_SQL = load_sql("loop_leases")

_TURN_S = 30.0


class LoopLease:
    """The right to run a loop, on the database's clock.

    A holder that stalls past its lease may go on without knowing, so what the loop writes has to
    be right when done twice, or to name the term.

    Args:
        database: the registry.
        name: of the loop.
        owner: random per start of a process, so that no process takes another's lease for its own.
    """

    def __init__(self, database: Database, name: str, owner: UUID) -> None:
        self._database = database
        self._values = {"name": name, "owner": owner}

    async def hold(self, lease_s: float) -> int | None:
        """Takes the lease if it is free, or renews it.

        Args:
            lease_s: how long it holds from now, in seconds.

        Returns the term, which grows with every change of hands; None if another process has the lease.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["hold"], {**self._values, "lease_s": lease_s})
            row = await cursor.fetchone()
            return None if row is None else row["term"]

    async def leads(self) -> bool:
        """Whether this process runs the loop now; it then does for half a minute at least."""
        return await self.hold(_TURN_S) is not None

    async def release(self) -> None:
        """Lets another process take the lease at once; nothing if it is not ours."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["release"], self._values)
