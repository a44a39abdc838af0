"""Leases of the loops that only one process runs at a time, and the fence around what those loops write."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn
from uuid import UUID

import structlog

from services.provisioner.domain.operation import LeaseLost
from services.provisioner.metrics import LEASE_TERM
from services.provisioner.store.rows import load_sql
from services.shared.errors import Unavailable
from services.shared.loops import LoopEnded
from services.shared.postgres import Connection, Database

log = structlog.get_logger(__name__)

_SQL = load_sql("loop_leases")


class LoopLease:
    """The right to run a loop, on the database's clock; and the registry, as that loop sees it.

    A holder that stalls past its lease goes on without knowing. So the loop's stores get their
    connections from here: each is a transaction that first locks the lease's row against a change of
    hands, and is refused unless the term is still the one that the loop began in. Hence nothing is
    ever written after another has taken the lease, however long the stall, and wherever it comes.

    Args:
        database: the registry.
        name: of the loop.
        owner: random per start of a process, so that no process takes another's lease for its own.
        lease_s: how long the lease holds without renewal, in seconds.
    """

    def __init__(self, database: Database, name: str, owner: UUID, lease_s: float) -> None:
        self._database = database
        self._name = name
        self._values = {"name": name, "owner": owner, "lease_s": lease_s}
        self._pause_s = lease_s / 3
        self._term: int | None = None
        self._told = LEASE_TERM.labels(name.partition(":")[0])

    async def lead(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
        """Runs the loop while this process has the lease, anew each time that it gets it, until cancelled.

        Raises:
            ExceptionGroup: of what the loop raised, `LoopEnded` if it returned.
        """
        try:
            while True:
                await self._take()
                log.info("loop_led", loop=self._name, term=self._term)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._keep())
                        await loop()
                        raise LoopEnded(self._name)
                except* LeaseLost:
                    log.warning("loop_lost", loop=self._name, term=self._term)
        finally:
            # It runs out by itself, if the registry is gone.
            with suppress(Unavailable):
                await self.release()

    async def _take(self) -> None:
        self._term = None
        while self._term is None:
            with suppress(Unavailable):
                self._term = await self.hold()
            if self._term is None:
                await asyncio.sleep(self._pause_s)

    async def _keep(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._pause_s)
            # Unreachable, the registry takes no writes either.
            with suppress(Unavailable):
                # A new term may be ours as well: others have led in between.
                if await self.hold() != self._term:
                    raise LeaseLost

    async def hold(self) -> int | None:
        """Takes the lease if it is free, or renews it.

        Returns the term, which grows with every change of hands; None if another process has the lease.
        """
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["hold"], self._values)
            row = await cursor.fetchone()
        term: int | None = None if row is None else row["term"]
        self._told.set(term or 0)
        return term

    async def release(self) -> None:
        """Lets another process take the lease at once; nothing if it is not ours."""
        self._told.set(0)
        async with self._database.connection() as connection:
            await connection.execute(_SQL["release"], self._values)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction within the term.

        Raises:
            LeaseLost: the lease has run out, or changed hands; nothing is written.
            Unavailable: as for `Database.transaction`.
        """
        async with self._database.transaction() as tx:
            cursor = await tx.execute(_SQL["lock_term"], {**self._values, "term": self._term})
            if cursor.rowcount == 0:
                raise LeaseLost(self._name)
            yield tx

    connection = transaction
    """A single statement needs the same fence."""
