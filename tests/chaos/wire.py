"""What lies between one process and PostgreSQL, and can be parted in silence."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from psycopg.conninfo import conninfo_to_dict

from tests.harness import Platform


class Wire:
    """Carries bytes both ways. While it is parted nobody is told anything; what was sent arrives once it is whole."""

    def __init__(self, socket: str) -> None:
        self.url = ""
        self._socket = socket
        self._whole = asyncio.Event()
        self._whole.set()
        self._carriers: set[asyncio.Task[None]] = set()

    def part(self) -> None:
        self._whole.clear()

    def join(self) -> None:
        self._whole.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        await self._whole.wait()
        away, to = await asyncio.open_unix_connection(self._socket)
        for source, sink in ((reader, to), (away, writer)):
            carrier = asyncio.create_task(self._one_way(source, sink))
            self._carriers.add(carrier)
            carrier.add_done_callback(self._carriers.discard)

    async def _one_way(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                while data := await source.read(65536):
                    await self._whole.wait()
                    sink.write(data)
        finally:
            sink.close()

    async def end(self) -> None:
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)


@asynccontextmanager
async def wire(platform: Platform) -> AsyncIterator[Wire]:
    """A wire to the platform's PostgreSQL; its `url` is the database's at the near end."""
    of = conninfo_to_dict(platform.database_url)
    made = Wire(f"{of['host']}/.s.PGSQL.{of.get('port', 5432)}")
    server = await asyncio.start_server(made.carry, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made.url = f"postgresql://{of['user']}@127.0.0.1:{port}/{of['dbname']}?sslmode=disable"
    try:
        yield made
    finally:
        server.close()
        await made.end()
