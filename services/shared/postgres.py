"""PostgreSQL for the services: a pool, transactions, and its errors in our terms."""

import asyncio
import select
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import psycopg
import structlog
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from services.shared.errors import Unavailable

Connection = psycopg.AsyncConnection[DictRow]

log = structlog.get_logger(__name__)

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
    "options": "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=15s -c timezone=UTC",
}


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
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            open=False,
            min_size=1,
            max_size=max_size,
            timeout=5,
            max_waiting=2_000,
            # Short, or the pauses between attempts would outgrow the outage; the next call tries anew.
            reconnect_timeout=2,
            check=_check,
            connection_class=psycopg.AsyncConnection[DictRow],
            kwargs={**self._parameters, "row_factory": dict_row, "autocommit": True},
        )

    async def open(self) -> None:
        """Connects.

        Raises:
            Unavailable: PostgreSQL can't be reached.
        """
        with translated():
            await self._pool.open(wait=True, timeout=30)

    async def close(self) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode, for single statements.

        Raises:
            Unavailable: PostgreSQL can't be reached, is overloaded, or did not answer in time.
        """
        with translated():
            async with self._pool.connection() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection within one transaction, committed at the end of the block.

        Raises:
            Unavailable: as for `connection`; nothing is committed, or the commit's fate is unknown.
        """
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def connect(self) -> Connection:
        """A connection of the caller's own, outside of the pool, in autocommit mode.

        What it raises is the driver's; `translated` makes it `Unavailable`.
        """
        return await psycopg.AsyncConnection.connect(
            self._url, autocommit=True, row_factory=dict_row, **self._parameters
        )

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
            log.warning("listener_disconnected", channel=channel)
            await asyncio.sleep(1)


async def _check(connection: Connection) -> None:
    """Asks PostgreSQL only if there is something to read: an idle connection says nothing but that it ends."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await AsyncConnectionPool.check_connection(connection)


class translated:  # noqa: N801 - used like a function
    """Turns the driver's errors of reachability into `Unavailable`, whose text says nothing of the inside."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(
            error, psycopg.OperationalError | psycopg.InterfaceError | PoolTimeout | PoolClosed | TooManyRequests
        ):
            log.warning("registry_unreachable", error=str(error), kind=type(error).__name__)
            raise Unavailable("the registry can't be reached") from error
