"""The rate limit over processes that are killed, cut off and started again: the limit holds in every window.

A window is a second here, so that many of them pass. Nothing is timed: what the load does next is waited for.
"""

import asyncio
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from services.admission.ratelimit_sql import forget_replica
from services.provisioner.store.migrations import migrate
from services.shared.postgres import Database
from tests.harness import DEADLINE_S, ROOT, eventually
from tests.integration.rate_limit_process import Orders

pytestmark = pytest.mark.early(20)

WINDOW_S = 1.0
LEASE_S = 0.05
ANSWER_S = 0.2
LIMIT = 200
# A call waits for one answer, and till others give up what they do not need; the machine may be busy.
LONGEST_CALL_S = 10 * ANSWER_S


class Proxy:
    """The registry over TCP, for who may lose it.

    Its modes: `open`; `mute` carries to the registry and nothing back; `dead` carries nothing;
    `refused` takes no connection and has none.
    """

    def __init__(self, database_url: str) -> None:
        self._info = conninfo_to_dict(database_url)
        self._connections: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self.mode = "open"
        self.url = ""

    async def open(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        overrides = {"host": "127.0.0.1", "port": port, "sslmode": "disable", "gssencmode": "disable"}
        self.url = make_conninfo("", **{**self._info, **overrides})
        return server

    def restore(self) -> None:
        """Carries again; what was lost is lost."""
        self.mode = "open"
        self.cut()

    def cut(self) -> None:
        for writer in self._connections:
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carrying = asyncio.create_task(self._carry(reader, writer))
        self._carrying.add(carrying)
        carrying.add_done_callback(self._carrying.discard)

    async def close(self) -> None:
        for carrying in self._carrying:
            carrying.cancel()
        if self._carrying:
            await asyncio.wait(self._carrying)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "refused":
            writer.close()
            return
        path = f"{self._info['host']}/.s.PGSQL.{self._info.get('port', 5432)}"
        back_reader, back_writer = await asyncio.open_unix_connection(path)
        ends = {writer, back_writer}
        self._connections |= ends
        try:
            with suppress(OSError):
                await asyncio.gather(
                    self._pump(reader, back_writer, {"open", "mute"}), self._pump(back_reader, writer, {"open"})
                )
        finally:
            self._connections -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: set[str]) -> None:
        while data := await reader.read(65536):
            if self.mode == "refused":
                self.cut()
            if self.mode in carried:
                writer.write(data)
                await writer.drain()
        writer.close()


class Replica:
    """A process of `rate_limit_process`, with an environment of its own beside the test's."""

    def __init__(self, orders: Orders, environment: Mapping[str, str]) -> None:
        self.orders = orders
        self.replica_id = UUID(orders.replica_id)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.rate_limit_process", json.dumps(asdict(orders))],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    def serving(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "admits\n"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def leave(self) -> tuple[float, datetime]:
        """Ends it orderly; returns how many seconds a call of its took at most, and what time it was to it."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        longest_s, now = map(float, out.split())
        return longest_s, datetime.fromtimestamp(now, UTC)

    def admits(self) -> list[float]:
        log = Path(self.orders.log)
        data = log.read_bytes() if log.exists() else b""
        return [moment for (moment,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]

    def admitted(self, windows: int = 1) -> int:
        """How many admits it has made in the last windows."""
        since = time.monotonic() - windows * WINDOW_S
        return sum(moment >= since for moment in self.admits())

    async def goes_on(self, windows: float = 1) -> None:
        """Returns once it admits after so many windows from now."""
        until = time.monotonic() + windows * WINDOW_S
        await soon(lambda: max(self.admits(), default=0) > until, "it goes on")


async def soon(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(eventually, condition, what)


class Field:
    """A product with a limit, and the replicas that admit to it."""

    def __init__(self, database: Database, url: str, directory: Path) -> None:
        self.database = database
        self.product_id = uuid4()
        self.replicas: list[Replica] = []
        self._url = url
        self._directory = directory

    async def open(self) -> None:
        async with self.database.connection() as connection:
            await connection.execute(
                "INSERT INTO products (product_id, slug, max_engines, rate_limit_rpm, allowed_images)"
                " VALUES (%s, %s, 1, %s, '{}')",
                [self.product_id, str(self.product_id), LIMIT],
            )
            await connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [self.product_id])

    async def start(
        self, url: str | None = None, *, callers: int = 8, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Replica:
        log = str(self._directory / f"admits-{len(self.replicas)}")
        times = {"window_s": WINDOW_S, "lease_s": LEASE_S, "answer_s": ANSWER_S, "stale_ok_s": 60.0}
        orders = Orders(
            url or self._url, str(uuid4()), str(self.product_id), LIMIT, log, callers=callers, pause_s=0.01, **times
        )
        replica = Replica(orders, environment)
        self.replicas.append(replica)
        await asyncio.to_thread(replica.serving)
        return replica

    async def bury(self, replica: Replica) -> None:
        await forget_replica(self.database, replica.replica_id, window_s=WINDOW_S, answer_s=ANSWER_S)

    async def value(self, sql: str, *parameters: object) -> Any:
        async with self.database.connection() as connection:
            row = await (await connection.execute(sql.encode(), parameters)).fetchone()
        return None if row is None else next(iter(row.values()))

    def admitted(self, windows: int = 1) -> int:
        return sum(replica.admitted(windows) for replica in self.replicas)

    async def all_used(self, part: float = 0.9) -> None:
        """Returns once such a part of the limit is used over two windows from now."""
        since = time.monotonic()
        await soon(
            lambda: time.monotonic() > since + 2 * WINDOW_S and self.admitted(2) > part * 2 * LIMIT,
            "all of the limit is used",
        )

    def check(self, taken: Iterable[float] = (), dated_within_s: float = 0) -> None:
        """In no window more than the limit: any admit and that one `LIMIT` later are a window apart."""
        admits = sorted(itertools.chain(taken, *(replica.admits() for replica in self.replicas)))
        assert len(admits) > 2 * LIMIT
        apart = [later - earlier for earlier, later in zip(admits, admits[LIMIT:], strict=False)]
        assert min(apart) >= WINDOW_S - dated_within_s


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(database_url)
    server = await proxy.open()
    yield proxy
    server.close()
    await proxy.close()


@asynccontextmanager
async def open_field(database_url: str, directory: Path) -> AsyncIterator[Field]:
    await migrate(database_url)
    database = Database(database_url, application_name="test")
    await database.open()
    field = Field(database, database_url, directory)
    await field.open()
    try:
        yield field
    finally:
        for replica in field.replicas:
            replica.kill()
        await database.close()


@pytest.fixture
async def field(database_url: str, tmp_path: Path) -> AsyncIterator[Field]:
    async with open_field(database_url, tmp_path) as field:
        yield field


async def test_all_of_the_limit_is_used_by_all_alike_and_never_more_whoever_dies(field: Field) -> None:
    replicas = [await field.start(), *await asyncio.gather(*(field.start() for _ in range(3)))]
    # A lease is a twentieth of this window, where it is a two-hundredth of a minute.
    await field.all_used(0.95)
    # The first had all of it.
    await soon(lambda: min(replica.admitted() for replica in replicas) > LIMIT / 4 / 2, "each gets its part")

    replicas[0].kill()
    await field.bury(replicas[0])
    assert (await asyncio.to_thread(replicas[1].leave))[0] < LONGEST_CALL_S
    await asyncio.gather(field.start(), field.start())
    await field.all_used()

    stopped = replicas[2]
    stopped.process.send_signal(signal.SIGSTOP)
    await field.replicas[-1].goes_on()
    stopped.process.send_signal(signal.SIGCONT)
    await stopped.goes_on()

    # One that is not known to be dead keeps its share.
    replicas[3].kill()
    share = await field.value("SELECT share FROM rate_shares WHERE replica_id = %s", replicas[3].replica_id)
    assert share
    await field.start()
    await field.replicas[-1].goes_on(2)
    assert field.admitted() <= LIMIT - share
    await field.bury(replicas[3])
    await field.all_used()
    field.check()


async def test_without_the_registry_each_goes_on_with_its_share(field: Field, proxy: Proxy) -> None:
    """One is cut off, its answers are lost, all are cut off; half of what they say gets through or none."""
    cut_off = await asyncio.gather(field.start(proxy.url), field.start(proxy.url))
    connected = await field.start()
    await field.all_used()
    for mode in ("dead", "refused", "mute"):
        proxy.mode = mode
        # Long enough that they have lost it for certain.
        await asyncio.gather(*(replica.goes_on(2) for replica in cut_off))
        if mode == "mute":
            break
        restored = await field.value("SELECT clock_timestamp()")
        proxy.restore()
        async with asyncio.timeout(DEADLINE_S):
            while not await field.value("SELECT bool_and(heard_at > %s) FROM rate_shares", restored):
                pass
    # It takes all of its share with it, for what it has made known is little.
    cut_off[0].kill()
    await field.bury(cut_off[0])
    successor = await field.start()
    proxy.restore()
    await field.all_used()
    for replica in (cut_off[1], connected, successor):
        assert (await asyncio.to_thread(replica.leave))[0] < LONGEST_CALL_S
    field.check()


async def test_beside_the_version_before_the_limit_is_one(field: Field) -> None:
    """That takes token by token, by `take_token`."""
    taken: list[float] = []
    replica = await field.start()
    until = time.monotonic() + 3 * WINDOW_S
    longest = 0.0
    while time.monotonic() < until:
        begun = time.monotonic()
        sql = "SELECT take_token(%s, %s, make_interval(secs => %s))"
        if await field.value(sql, field.product_id, LIMIT, WINDOW_S) is None:
            taken.append(time.monotonic())
        longest = max(longest, time.monotonic() - begun)
    assert taken
    assert replica.admits()
    # Its tokens are dated within the call.
    field.check(taken, longest)


async def test_the_limit_outlasts_steps_of_the_registrys_clock(field: Field) -> None:
    """A clock in front of PostgreSQL's own, as every session's first schema."""
    async with field.database.connection() as connection:
        await connection.execute("CREATE SCHEMA stepped")
        await connection.execute("CREATE TABLE stepped.step AS SELECT interval '0' AS by")
        await connection.execute(
            "CREATE FUNCTION stepped.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE"
            " AS 'SELECT pg_catalog.clock_timestamp() + by FROM stepped.step'"
        )
        await connection.execute(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = stepped, pg_catalog, public',"
            " current_database()); END $$"
        )
    replicas = await asyncio.gather(*(field.start() for _ in range(2)))
    await field.all_used()
    for hours in (1, -1):
        async with field.database.connection() as connection:
            await connection.execute("UPDATE stepped.step SET by = make_interval(hours => %s)", [hours])
        await field.all_used()
        ahead = await field.value("SELECT extract(epoch FROM ahead)::float FROM rate_clock")
        assert abs(ahead - hours * 3600) < 10
    # The clock frees the shares of the dead.
    replicas[0].kill()
    await field.start()
    await field.replicas[-1].goes_on(0.5)
    field.check()
