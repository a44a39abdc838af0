"""The rate limit over processes that are killed, cut off and started again: the limit holds in every window.

Windows are of two seconds here, so that many of them pass; all that is measured in windows is the same.
"""

import asyncio
import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from services.admission.ratelimit_sql import forget_replica
from services.provisioner.store.migrations import migrate
from services.shared.postgres import Database
from tests.harness import ROOT
from tests.integration.rate_limit_process import Orders

WINDOW_S = 2.0
LEASE_S = 0.05
ANSWER_S = 0.2
LIMIT = 200


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
    """A process of `rate_limit_process`."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.rate_limit_process", json.dumps(asdict(orders))],
            cwd=ROOT,
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

    def leave(self) -> float:
        """Ends it orderly; returns the longest time in seconds that a call of its took."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return float(out)

    def admits(self) -> list[float]:
        log = Path(self.orders.log)
        data = log.read_bytes() if log.exists() else b""
        return [moment for (moment,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]


class Field:
    """A product with a limit, and the replicas that admit to it."""

    def __init__(self, url: str, directory: Path, limit: int) -> None:
        self.url = url
        self.directory = directory
        self.limit = limit
        self.product_id = uuid4()
        self.replicas: list[Replica] = []
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO products (product_id, slug, max_engines, rate_limit_rpm, allowed_images)"
                " VALUES (%s, %s, 1, %s, '{}')",
                [self.product_id, str(self.product_id), limit],
            )
            connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [self.product_id])

    async def start(self, url: str | None = None) -> Replica:
        log = str(self.directory / f"admits-{len(self.replicas)}")
        times = {"window_s": WINDOW_S, "lease_s": LEASE_S, "answer_s": ANSWER_S, "stale_ok_s": 60.0}
        orders = Orders(
            url or self.url,
            str(uuid4()),
            str(self.product_id),
            self.limit,
            log,
            callers=8,
            pause_s=0.01,
            **times,
        )
        self.replicas.append(Replica(orders))
        await asyncio.to_thread(self.replicas[-1].serving)
        return self.replicas[-1]

    def admits(self) -> list[float]:
        return sorted(moment for replica in self.replicas for moment in replica.admits())

    def used(self, since: float, until: float) -> float:
        """Which part of what the limit allows in that time was admitted."""
        n = sum(since <= moment < until for moment in self.admits())
        return n / (self.limit * (until - since) / WINDOW_S)

    def check(self) -> None:
        """In no window more than the limit: any admit and that one `limit` later are a window apart."""
        admits = self.admits()
        assert len(admits) > self.limit
        apart = [later - earlier for earlier, later in zip(admits, admits[self.limit :], strict=False)]
        assert min(apart) >= WINDOW_S


@pytest.fixture
async def database(field: "Field") -> AsyncIterator[Database]:
    database = Database(field.url, application_name="test")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(database_url)
    server = await proxy.open()
    yield proxy
    server.close()
    await proxy.close()


@pytest.fixture
async def field(database_url: str, tmp_path: Path) -> AsyncIterator[Field]:
    await migrate(database_url)
    field = Field(database_url, tmp_path, LIMIT)
    yield field
    for replica in field.replicas:
        replica.kill()


async def test_at_saturation_all_of_the_limit_is_used_by_all_alike(field: Field) -> None:
    for _ in range(4):
        await field.start()
    begun = time.monotonic()
    await asyncio.sleep(5 * WINDOW_S)
    until = time.monotonic()
    for replica in field.replicas:
        assert await asyncio.to_thread(replica.leave) < ANSWER_S + 3 * LEASE_S
    field.check()
    # A lease is a fortieth of this window, where it is a two-hundredth of a minute.
    assert field.used(begun, until) > 0.97
    # The last to come got its part from those who had all of it.
    last_window = [sum(moment > until - WINDOW_S for moment in replica.admits()) for replica in field.replicas]
    assert min(last_window) > LIMIT / 4 / 2


async def test_replicas_that_are_killed_leave_what_they_used_and_no_more(field: Field, database: Database) -> None:
    for _ in range(4):
        await field.start()
    await asyncio.sleep(WINDOW_S)
    begun = time.monotonic()
    for victim in range(6):
        replica = field.replicas[victim]
        if victim % 3 == 2:
            await asyncio.to_thread(replica.leave)
        else:
            replica.kill()
            await forget_replica(database, UUID(replica.orders.replica_id), answer_s=ANSWER_S)
        await field.start()
        await asyncio.sleep(WINDOW_S / 2)
    until = time.monotonic()
    field.check()
    assert field.used(begun, until) > 0.9


async def test_a_replica_that_is_killed_and_not_known_to_be_dead_keeps_its_share(field: Field) -> None:
    await field.start()
    await asyncio.sleep(WINDOW_S)
    field.replicas[0].kill()
    assert len(field.admits()) >= LIMIT
    successor = await field.start()
    await asyncio.sleep(WINDOW_S)
    assert successor.admits() == []


async def test_without_the_registry_each_goes_on_with_its_share(field: Field, proxy: Proxy) -> None:
    """One is cut off, its answers are lost, all are cut off; half of what they say gets through or none."""
    cut_off = [await field.start(proxy.url) for _ in range(2)]
    await field.start()
    await asyncio.sleep(WINDOW_S)
    for mode in ("mute", "dead", "refused", "mute"):
        proxy.mode = mode
        begun = time.monotonic()
        await asyncio.sleep(2 * WINDOW_S)
        alone = [sum(moment > begun + WINDOW_S for moment in replica.admits()) for replica in cut_off]
        assert min(alone) > 0, mode
        proxy.restore()
        await asyncio.sleep(WINDOW_S)
    longest = [await asyncio.to_thread(replica.leave) for replica in field.replicas]
    field.check()
    assert max(longest) < ANSWER_S + 6 * LEASE_S
    assert field.used(begun, time.monotonic()) > 0.5


async def test_a_replica_that_dies_cut_off_takes_its_whole_share_with_it(
    field: Field, proxy: Proxy, database: Database
) -> None:
    cut_off = await field.start(proxy.url)
    await asyncio.sleep(WINDOW_S)
    proxy.mode = "mute"
    await asyncio.sleep(2 * WINDOW_S)
    assert any(moment > time.monotonic() - WINDOW_S for moment in cut_off.admits())
    cut_off.kill()
    await forget_replica(database, UUID(cut_off.orders.replica_id), answer_s=ANSWER_S)
    await field.start()
    await asyncio.sleep(2 * WINDOW_S)
    field.check()


async def test_a_replica_that_was_stopped_has_not_missed_what_went_on(field: Field) -> None:
    stopped = await field.start()
    await field.start()
    for _ in range(3):
        await asyncio.sleep(WINDOW_S / 2)
        stopped.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(WINDOW_S)
        stopped.process.send_signal(signal.SIGCONT)
    field.check()


async def test_beside_the_version_before_the_limit_is_one(field: Field, database: Database) -> None:
    """That takes token by token, by `take_token`."""
    taken: list[float] = []
    await field.start()
    until = time.monotonic() + 4 * WINDOW_S
    async with database.connection() as connection:
        while time.monotonic() < until:
            before = time.monotonic()
            cursor = await connection.execute(
                "SELECT take_token(%s, %s, make_interval(secs => %s)) AS wait_s", [field.product_id, LIMIT, WINDOW_S]
            )
            row = await cursor.fetchone()
            assert row is not None
            if row["wait_s"] is None:
                taken.append(before)
            else:
                await asyncio.sleep(0.01)
    assert taken
    # Tokens are dated in the call: up to the time that it took.
    admits = sorted(field.admits() + taken)
    apart = [later - earlier for earlier, later in zip(admits, admits[LIMIT:], strict=False)]
    assert min(apart) > WINDOW_S - 0.1


@pytest.mark.parametrize("step", ["1 hour", "-1 hour"])
async def test_the_limit_outlasts_a_step_of_the_registrys_clock(field: Field, database: Database, step: str) -> None:
    """A clock in front of PostgreSQL's own, as every session's first schema."""
    async with database.connection() as connection:
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
    for _ in range(2):
        await field.start()
    await asyncio.sleep(WINDOW_S)
    async with database.connection() as connection:
        await connection.execute("UPDATE stepped.step SET by = %s", [step])
    begun = time.monotonic()
    await asyncio.sleep(2 * WINDOW_S)
    assert field.used(begun, time.monotonic()) > 0.9
    # Of the dead, whose shares the clock frees.
    field.replicas[0].kill()
    await field.start()
    await asyncio.sleep(WINDOW_S)
    field.check()
    async with database.connection() as connection:
        cursor = await connection.execute("SELECT ahead FROM rate_clock")
        row = await cursor.fetchone()
    assert row is not None
    assert abs(row["ahead"].total_seconds()) > 3000
