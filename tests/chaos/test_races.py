"""Many who want the same thing at the same moment, of several Provisioners: one gets it, and no limit is passed."""

import asyncio
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import cast
from uuid import UUID

import grpc
import psutil
import psycopg
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1.engine_pb2 import Engine
from tests.chaos.crew import Crew
from tests.chaos.oracle import oracle
from tests.chaos.own_postgres import own_postgres
from tests.chaos.racers import PATIENCE_S, race
from tests.chaos.score_card import Score
from tests.harness import Clients, Platform, Product, eventually, ports_from, reason, retry_after_s, running_platform
from tests.integration.test_life_cycle import User, accepted, process_of
from tests.integration.test_sleep import REASON, Sleepers
from tests.integration.test_warm_pool import destroy, ensure, filled, pool_of, ready

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
Extent = Callable[[int, int], int]
REPLICAS, PROVISIONERS = 8, 3
DUPLICATES, ABOVE = "duplicate engines, 1,000 users × 8 replicas", "samples above `max_engines`"
TOGETHER = "wrong-tenant 200s; warm double claims; hangs in 10,000 sleep/admit races"
# It starts quickly, and there are many of them.
IMAGE = {"ORCH_ENGINE_IMAGE": "tests.engines.moody"}
# Longer than a wake takes on a crowded machine.
HANGS_S = 30
# Longer than an engine takes that is not frozen.
ANSWERS_S = 2


@asynccontextmanager
async def sampled(platform: Platform, product: Product) -> AsyncIterator[list[int]]:
    """How many engines the product has at every moment of the block, as somebody else sees it."""
    samples: list[int] = []

    async def sample() -> None:
        count = b"SELECT count(*) FROM engines WHERE product_id = %s"
        async with await psycopg.AsyncConnection.connect(platform.database_url, autocommit=True) as connection:
            while True:
                cursor = await connection.execute(count, [product.product_id])
                samples.extend(n for (n,) in await cursor.fetchall())
                await asyncio.sleep(0.002)

    sampling = asyncio.create_task(sample())
    yield samples
    assert not sampling.done()
    sampling.cancel()


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Platform]:
    """An installation whose PostgreSQL has connections for so many Provisioners."""
    with own_postgres() as postgres:
        postgres.stop()
        postgres.start(max_connections="200")
        with running_platform(postgres.url, tmp_path, **ports_from(20000)) as platform:
            yield platform


@pytest.mark.early(195)
@pytest.mark.figure(DUPLICATES)
async def test_of_all_who_want_a_users_engine_at_once_one_makes_it(
    wide: Platform, connect: Connect, score: Score, extent: Extent
) -> None:
    services = [wide.provisioner(**IMAGE) for _ in range(REPLICAS)]
    product = await connect(wide, *services).register()
    groups = [[f"u{turn}-{n}" for n in range(20)] for turn in range(extent(3, 50))]
    user_ids = [user_id for group in groups for user_id in group]
    got = await asyncio.to_thread(race, [service.address for service in services], product, [groups] * REPLICAS)
    # What every replica was given for a user is the same.
    differ = [user_id for user_id, given in zip(user_ids, zip(*got, strict=True), strict=True) if len(set(given)) > 1]
    refused = [one for each in got for one in each if "-" not in one]
    made = dict(wide.query("SELECT user_id, count(*) FROM operations WHERE kind = 'provision' GROUP BY 1"))
    duplicates = len(differ) + sum(count - 1 for count in made.values())
    value = f"{duplicates} of {len(user_ids):,} users"
    score(DUPLICATES, value, duplicates == 0)
    assert (differ, refused, made) == ([], [], dict.fromkeys(user_ids, 1))
    await asyncio.to_thread(oracle, wide)


async def test_all_who_start_at_once_get_a_port_though_others_take_some(
    platform: Platform, connect: Connect, extent: Extent
) -> None:
    chance, starts = random.Random(1), extent(20, 100)
    # No other test has any of them.
    ports = range(32000, 32000 + starts * 13 // 10)
    limits = {"ORCH_PORT_MIN": f"{ports[0]}", "ORCH_PORT_MAX": f"{ports[-1]}", "ORCH_BOOT_TIMEOUT_S": "180"}
    clients = connect(platform, platform.provisioner(**IMAGE, **limits))
    product = await clients.register()

    async def start(user: User) -> Engine:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    return cast("Engine", await user.call("Provision"))
                except grpc.aio.AioRpcError as error:
                    # On a crowded machine they are too many for one product to make at once.
                    if reason(error) != "UNAVAILABLE":
                        raise
                    await asyncio.sleep(retry_after_s(error))

    with ExitStack() as others:

        def take(port: int) -> bool:
            with suppress(OSError):
                others.enter_context(socket.create_server(("127.0.0.1", port)))
                return True
            return False

        for port in chance.sample(ports, starts // 5):
            assert take(port)
        users = [User(clients, product, f"u{n}") for n in range(starts)]
        starting = asyncio.gather(*map(start, users))
        late = 0
        while late < starts // 20:
            late += take(chance.choice(ports))
            await asyncio.wait([starting], timeout=0.05)
            assert not starting.done(), "some ports are taken while engines start"
        made = await starting
    assert len({engine.url for engine in made}) == starts
    assert {engine.status for engine in made} == {Engine.Status.running}
    await asyncio.to_thread(oracle, platform)


async def test_a_port_lost_to_one_who_never_answers_is_swapped_within_a_boot(platform: Platform) -> None:
    platform.environment |= {"ORCH_BOOT_TIMEOUT_S": "12", "ORCH_HEALTH_CHECK_TIMEOUT_S": "2"}
    crew = Crew(platform)
    await crew.muster(1)
    [clients] = crew.clients()
    user = User(clients, await clients.register())
    crew.break_at("boot.started", "SIGSTOP")
    starting = asyncio.create_task(user.call("Provision"))
    stopped = await crew.broken("boot.started")
    [engine] = platform.engine_processes()
    engine.kill()
    await asyncio.to_thread(eventually, lambda: not platform.engine_processes(), "the engine has ended")
    [(port,)] = platform.query("SELECT port FROM port_leases")
    with socket.create_server(("127.0.0.1", port)):
        stopped.process.send_signal(signal.SIGCONT)
        made = await starting
    assert made.status == Engine.Status.running
    assert not made.url.endswith(f":{port}")
    await crew.close()


@pytest.mark.figure(ABOVE)
async def test_a_product_is_never_seen_above_its_limit(
    platform: Platform, connect: Connect, score: Score, extent: Extent
) -> None:
    most = 5
    services = [platform.provisioner(**IMAGE) for _ in range(PROVISIONERS)]
    product = await connect(platform, *services).register(max_engines=most)
    turns = extent(3, 20)
    users = [[[f"u{turn}-{n}"] for turn in range(turns)] for n in range(REPLICAS)]
    async with sampled(platform, product) as samples:
        got = await asyncio.to_thread(race, [service.address for service in services], product, users)
    above = sum(n > most for n in samples)
    score(ABOVE, str(above), above == 0)
    assert max(samples) == most
    outcomes = Counter("made" if "-" in one else one for each in got for one in each)
    assert outcomes.keys() == {"made", "QUOTA_EXCEEDED"}
    assert outcomes["made"] >= most * turns
    await asyncio.to_thread(oracle, platform)


@pytest.mark.figure(TOGETHER)
async def test_no_member_of_the_pool_is_given_twice_though_members_die(
    platform: Platform, connect: Connect, seed: int, score: Score, extent: Extent
) -> None:
    chance, size, turns = random.Random(seed), 8, extent(1, 7)
    services = [platform.provisioner(**pool_of(size, **IMAGE)) for _ in range(PROVISIONERS)]
    clients = [connect(platform, service) for service in services]
    # Boots of their own would only take time.
    product = await clients[0].register(max_engines=size)
    owners: Counter[str] = Counter()
    # If more ask at once, those who find every member in another's hands boot, and are first.
    places = asyncio.Semaphore(16)

    async def claim(user_id: str) -> str | None:
        try:
            async with places:
                engine = await ensure(chance.choice(clients), product, user_id)
        except grpc.aio.AioRpcError as error:
            if reason(error) != "QUOTA_EXCEEDED":
                raise
            return None
        owners[engine.engine_id] += 1
        return user_id

    for turn in range(turns):
        await filled(platform, size)
        doomed = chance.choice(ready(platform))
        for process in platform.engine_processes():
            with suppress(psutil.Error):
                if process.environ()["SEPTEMBER_ENGINE_ID"] == doomed:
                    process.kill()
        given = await asyncio.gather(*(claim(f"u{turn}-{n}") for n in range(64)))
        await asyncio.gather(*(destroy(chance.choice(clients), product, one) for one in given if one is not None))
    twice = [engine_id for engine_id, count in owners.items() if count > 1]
    score(TOGETHER, f"double claims: {len(twice)}", not twice)
    assert twice == []
    claimed = platform.query("SELECT count(*) FROM audit_events WHERE detail = 'from the warm pool'")
    # All but the dead one, if no look at one comes too late for the claim.
    assert claimed[0][0] >= turns * size // 2
    await filled(platform, size)


@pytest.mark.early(85)
@pytest.mark.figure(TOGETHER)
async def test_nobody_who_is_admitted_hangs_or_finds_the_engine_of_another(
    platform: Platform, connect: Connect, seed: int, score: Score, extent: Extent
) -> None:
    sleepers = Sleepers(platform, connect)
    users = [await sleepers.user(f"u{n}", idle_sleep_after_s=None) for n in range(extent(8, 32))]
    admits = Admits(sleepers, random.Random(seed))
    async with admits.looking():
        # The three seeds together make ten thousand.
        while admits.that_met_a_sleep() < extent(100, 3_334):
            await asyncio.gather(*(admits.race(user) for user in users))
    frozen = admits.whose_engine_was_frozen()
    hangs, strangers, met = len(admits.hung) + len(frozen), len(admits.strangers), admits.that_met_a_sleep()
    score(TOGETHER, f"wrong tenants: {strangers}, hangs: {hangs} in {met:,} races", not (strangers or hangs))
    assert (frozen, admits.hung, admits.strangers) == ([], [], [])
    sleeps = dict(platform.query("SELECT outcome, count(*) FROM operations WHERE kind = 'sleep' GROUP BY 1"))
    print(f"{len(admits.made)} admits, of which {met} met a sleep: {sleeps}")
    assert sleeps.get("succeeded", 0) > 0, "no engine was found asleep"
    assert sleeps.get("cancelled", 0) + sleeps.get("failed", 0) > 0, "no sleep was called off"


class Admits:
    """Admits at the moments when engines fall asleep, and what was wrong with engines that were handed out."""

    def __init__(self, sleepers: Sleepers, chance: random.Random) -> None:
        self._sleepers = sleepers
        self._chance = chance
        self._falling_asleep: set[str] = set()
        self.made: list[tuple[str, float]] = []
        self.let_in: list[tuple[str, float, float]] = []
        self.hung: list[str] = []
        self.strangers: list[str] = []

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """In the block it is known which sleeps are announced, and not over yet."""

        async def look() -> None:
            query = b"SELECT engine_id::text FROM operations WHERE kind = 'sleep' AND finished_at IS NULL"
            url = self._sleepers.platform.database_url
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                while True:
                    self._falling_asleep = {one for (one,) in await (await connection.execute(query)).fetchall()}
                    await asyncio.sleep(0.02)

        looking = asyncio.create_task(look())
        yield
        assert not looking.done()
        looking.cancel()

    async def race(self, user: User) -> None:
        """Puts the user's engine to sleep; eight admits come meanwhile, and some of them would wake it.

        Some come as soon as the sleep is asked for, or just when it is announced, and the others until it is over.
        Whoever was let in uses the engine at once, and once more if the sleep was called off.
        """
        chance = self._chance
        engine = (await user.admit(auto_provision=True, auto_wake=True)).engine
        # Nobody is let in for so long that it may sleep.
        await asyncio.sleep(chance.uniform(1, 1.2))
        waking, early = chance.choice((0, 0, 0.2)), chance.choice((0, 0, 1, 3))
        sleep = asyncio.create_task(self._sleep(user))
        admits = [self._admit(user, engine, chance.uniform(0, 0.03), waking) for _ in range(early)]
        begun = [asyncio.create_task(admit) for admit in admits]
        while not (sleep.done() or engine.engine_id in self._falling_asleep):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        longest_s = (0.03, 0.8)
        admits = [self._admit(user, engine, chance.uniform(0, longest_s[n % 2]), waking) for n in range(8 - early)]
        let_in = await asyncio.gather(*begun, *admits)
        await sleep
        if any(let_in) and await asyncio.to_thread(self._was_called_off, engine.engine_id):
            await self._use(user, engine, engine.url)

    def _was_called_off(self, engine_id: str) -> bool:
        """Whether the last sleep was; one that goes on though its caller was told may freeze the engine yet."""
        last = (
            "SELECT outcome IN ('cancelled', 'failed') FROM operations WHERE engine_id = %s AND kind = 'sleep'"
            " ORDER BY finished_at DESC NULLS FIRST LIMIT 1"
        )
        return bool(self._sleepers.platform.query(last, UUID(engine_id))[0][0])

    async def _sleep(self, user: User) -> None:
        with suppress(grpc.aio.AioRpcError):
            await user.call("Sleep")

    async def _admit(self, user: User, engine: Engine, delay_s: float, waking: float) -> bool:
        request = admission_pb.AdmitRequest(user_id=user.user_id, auto_wake=self._chance.random() < waking)
        admission = self._chance.choice(self._sleepers.clients.admissions)
        await asyncio.sleep(delay_s)
        begun = time.time()
        self.made.append((engine.engine_id, begun))
        try:
            async with asyncio.timeout(HANGS_S):
                answer = await admission.Admit(request, metadata=user.product.metadata)
        except TimeoutError:
            self.hung.append(user.user_id)
            return False
        assert answer.admitted or answer.reason == REASON.engine_sleeping
        if answer.admitted:
            self.let_in.append((engine.engine_id, begun, time.time()))
            await self._use(user, engine, answer.engine.url)
        return bool(answer.admitted)

    async def _use(self, user: User, engine: Engine, url: str) -> None:
        # No other engine would take the key.
        using = asyncio.create_task(accepted(url, engine.api_key))
        try:
            async with asyncio.timeout(HANGS_S):
                answered, _ = await asyncio.wait([using], timeout=ANSWERS_S)
                # Another's wake may thaw it yet.
                if not answered and await asyncio.to_thread(self._is_frozen_though_it_runs, engine.engine_id):
                    raise TimeoutError
                if not await using:
                    self.strangers.append(user.user_id)
        except TimeoutError:
            using.cancel()
            self.hung.append(user.user_id)

    def _is_frozen_though_it_runs(self, engine_id: str) -> bool:
        """Whether its process is stopped, and no sleep is under way or done; one that is, is judged in the end."""
        runs = "SELECT status_since FROM engines WHERE engine_id = %s AND status = 'running'"
        platform = self._sleepers.platform
        since, process = platform.query(runs, UUID(engine_id)), process_of(platform, engine_id)
        stopped = process is not None and process.status() == psutil.STATUS_STOPPED
        return stopped and since != [] and platform.query(runs, UUID(engine_id)) == since

    def whose_engine_was_frozen(self) -> list[str]:
        """Engines that were to be frozen though somebody was let in, no matter for how long.

        A sleep by request may follow an admit that is a second older. From then on nobody is let in, if it comes to
        freezing, until an operation has ended that leaves the engine awake: the sleep, called off at last, or a wake.
        """
        frozen = (
            "SELECT engine_id::text"
            " FROM unnest(%s::uuid[], %s::float[], %s::float[]) AS let_in (engine_id, begun, answered)"
            " JOIN operations sleep USING (engine_id)"
            " WHERE kind = 'sleep' AND step = 'freezing' AND to_timestamp(begun) > created_at - interval '1 second'"
            " AND NOT EXISTS (SELECT FROM operations awake WHERE awake.engine_id = let_in.engine_id"
            " AND (awake.kind <> 'sleep' OR awake.outcome <> 'succeeded')"
            " AND awake.finished_at BETWEEN sleep.finished_at AND to_timestamp(answered))"
        )
        return [one for (one,) in self._sleepers.platform.query(frozen, *map(list, zip(*self.let_in, strict=True)))]

    def that_met_a_sleep(self) -> int:
        """How many came when a sleep was announced, and was neither done nor called off."""
        met = (
            "SELECT count(*) FROM unnest(%s::uuid[], %s::float[]) AS admits (engine_id, at)"
            " WHERE EXISTS (SELECT FROM operations o WHERE o.engine_id = admits.engine_id AND kind = 'sleep'"
            " AND at BETWEEN extract(epoch FROM created_at) AND extract(epoch FROM finished_at))"
        )
        engine_ids, moments = [one for one, _ in self.made], [at for _, at in self.made]
        return int(self._sleepers.platform.query(met, engine_ids, moments)[0][0])
