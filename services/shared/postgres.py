"""PostgreSQL for the services: a pool, transactions, and its errors in our terms."""

import asyncio
import os
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import psycopg
import structlog
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from services.shared.errors import Unavailable
from services.shared.metrics import LISTENER_LOSSES, POOL, REGISTRY_ERRORS

Connection = psycopg.AsyncConnection[DictRow]

log = structlog.get_logger(__name__)

_UNREACHABLE = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
    PoolTimeout,
    PoolClosed,
    TooManyRequests,
)
_OPEN_S = 30.0
# How often a lost PostgreSQL is tried.
_TRY_S = 0.5
# Longer than PostgreSQL lets a statement take: who holds a connection for this long gets no answer.
_SILENCE_S = 12.0

# A connection that went half-open is noticed within seconds, and no statement, lock or forgotten
# transaction holds a connection for long.
_CONNECTION_PARAMETERS: dict[str, Any] = {
    # A prepared statement fails once a migration has changed its result, and behind some poolers.
    "prepare_threshold": None,
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    # A server that only reads is a standby, or is about to be one; what it says may be old.
    "target_session_attrs": "read-write",
}
_STATEMENT_MS = 10_000
_OPTIONS = "-c lock_timeout=5s -c idle_in_transaction_session_timeout=15s -c timezone=UTC"


class Connections(Protocol):
    """What most stores need of a database; see there."""

    def connection(self) -> AbstractAsyncContextManager[Connection]: ...
    def transaction(self) -> AbstractAsyncContextManager[Connection]: ...


class Database:
    """A bounded pool of connections.

    Args:
        url: connection string of PostgreSQL.
        application_name: how its connections are known to PostgreSQL.
        max_size: most connections.
    """

    def __init__(self, url: str, *, application_name: str, max_size: int = 10) -> None:
        self._url = url
        self._parameters = {**_CONNECTION_PARAMETERS, "application_name": application_name}
        self._lost = False
        self._regaining: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            open=False,
            min_size=1,
            max_size=max_size,
            timeout=5,
            max_waiting=2_000,
            # Next to nothing, or the pauses between attempts would outgrow the outage.
            reconnect_timeout=0.1,
            reconnect_failed=self._lose,
            configure=self._find,
            check=_check,
            connection_class=psycopg.AsyncConnection[DictRow],
            kwargs=self._arguments(_STATEMENT_MS),
        )

    async def open(self) -> None:
        """Connects.

        Raises:
            Unavailable: PostgreSQL can't be reached.
        """
        try:
            with translated():
                await self._pool.open(wait=True, timeout=_OPEN_S)
        except Unavailable:
            await self.close()
            raise
        POOL.observe(self._pool.get_stats)

    async def close(self) -> None:
        if self._regaining is not None:
            self._regaining.cancel()
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode, for single statements.

        Raises:
            Unavailable: PostgreSQL can't be reached, is overloaded, or did not answer in time.
        """
        if self._lost:
            REGISTRY_ERRORS.inc()
            raise Unavailable("the registry can't be reached")
        with translated():
            connection = await self._lend()
            silence = asyncio.get_running_loop().call_later(_SILENCE_S, _hang_up, connection)
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:
                # The next connection is to whoever is written to by then.
                await connection.close()
                raise
            finally:
                silence.cancel()
                await self._give_back(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection within one transaction, committed at the end of the block.

        Raises:
            Unavailable: as for `connection`; nothing is committed, or the commit's fate is unknown.
        """
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def connect(self, *, statement_ms: int = _STATEMENT_MS) -> Connection:
        """A connection of the caller's own, outside of the pool, in autocommit mode.

        What it raises is the driver's; `translated` makes it `Unavailable`.

        Args:
            statement_ms: most milliseconds of a statement.
        """
        return await psycopg.AsyncConnection.connect(self._url, **self._arguments(statement_ms))

    async def listen(self, channel: str, heard: Callable[[str], None]) -> None:
        """Calls `heard` with every payload of a NOTIFY on `channel`, and with `""` after every (re)connect.

        Runs until cancelled.

        A notification is a hint: some are lost when the connection is, so whoever is woken by it
        polls as well. The connection is its own, since LISTEN does not survive a pooler.
        """
        while True:
            with suppress(psycopg.Error):
                async with await self.connect() as connection:
                    await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    heard("")
                    async for notification in connection.notifies():
                        heard(notification.payload)
            LISTENER_LOSSES.labels(channel).inc()
            log.warning("listener_disconnected", channel=channel)
            await asyncio.sleep(1)

    def _arguments(self, statement_ms: int) -> dict[str, Any]:
        options = f"-c statement_timeout={statement_ms} {_OPTIONS}"
        return {**self._parameters, "options": options, "row_factory": dict_row, "autocommit": True}

    async def _lend(self) -> Connection:
        """Not to whoever is cancelled as the connection comes: `asyncio.wait_for`, by which the pool
        waits, loses that in Python 3.11, and a loop would never end.
        """
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        connection = await self._pool.getconn()
        if task.cancelling() > cancelled:
            await self._give_back(connection)
            raise asyncio.CancelledError
        return connection

    async def _give_back(self, connection: Connection) -> None:
        """Cancelled on its way back, a connection would be lost to the pool."""
        returning = asyncio.create_task(self._pool.putconn(connection))
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)
        await asyncio.shield(returning)

    async def _lose(self, pool: object) -> None:
        """An attempt to connect has failed. Without any connection left nobody waits for one.

        Those who have waited in vain are taken for waiting until there is a connection, and once
        they are too many, nobody would make the pool try.
        """
        if not self._lost and self._pool.get_stats()["pool_size"] == 0:
            self._lost = True
            self._regaining = asyncio.create_task(self._regain())

    async def _regain(self) -> None:
        while self._lost:
            await asyncio.sleep(_TRY_S)
            # Which has a pool without connections try once.
            await self._pool.check()

    async def _find(self, connection: Connection) -> None:
        self._lost = False


async def _check(connection: Connection) -> None:
    """Asks PostgreSQL only if there is something to read: an idle connection says nothing but that it ends."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await AsyncConnectionPool.check_connection(connection)


def _hang_up(connection: Connection) -> None:
    """Ends a connection under whoever waits for its answer; cancelled, they would wait on."""
    with suppress(psycopg.OperationalError, OSError), socket.socket(fileno=os.dup(connection.fileno())) as wire:
        wire.shutdown(socket.SHUT_RDWR)


class translated:  # noqa: N801 - used like a function
    """Turns the driver's errors of reachability into `Unavailable`, whose text says nothing of the inside."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _UNREACHABLE):
            REGISTRY_ERRORS.inc()
            log.warning("registry_unreachable", error=str(error), kind=type(error).__name__)
            raise Unavailable("the registry can't be reached") from error
