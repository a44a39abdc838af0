"""Clocks set by an hour, of PostgreSQL and of replicas: no window has more admits than the limit, and hardly fewer."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from services.provisioner.domain.operation import Queue
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.store.health import HealthStore
from services.provisioner.store.migrations import migrate
from services.provisioner.store.ports import PortAllocator
from services.shared.postgres import Database
from tests.chaos.clock import Clock, clock
from tests.chaos.oracle import oracle
from tests.chaos.own_postgres import own_postgres
from tests.chaos.score_card import Score
from tests.harness import Clients, eventually, running_platform
from tests.integration.test_life_cycle import User
from tests.integration.test_operations import operations, queue
from tests.integration.test_rate_limit import open_field
from tests.integration.test_rate_limit_minute import LIMIT, MINUTE_S, Load

pytestmark = pytest.mark.early(20)

OVER, UNDER = "over-admits, 8 replicas, any 60 s, clocks ±1 h", "under-admission at saturation"

Connect = Callable[..., Clients]
Extent = Callable[[int, int], int]

REPLICAS = 8
COUNTED = {"ORCH_PORT_MIN": "23500", "ORCH_PORT_MAX": "23999", "ORCH_ENGINE_IMAGE": "tests.engines.counted"}


def clocks(stack: ExitStack, replicas: int) -> list[Clock]:
    """That of PostgreSQL, and one for each replica."""
    return [stack.enter_context(clock()) for _ in range(1 + replicas)]


@pytest.mark.figure(OVER)
async def test_in_no_second_more_than_the_limit_whatever_the_clocks_say(
    tmp_path: Path, seed: int, extent: Extent
) -> None:
    """A window is a second here."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        registrys, *replicas = clocks(stack, 3)
        postgres = stack.enter_context(own_postgres(environment=registrys.environment))
        async with open_field(postgres.url, tmp_path) as field:
            for own in replicas:
                await field.start(callers=4, environment=own.environment)
            await field.all_used()
            for _ in range(extent(1, 10)):
                for one in (registrys, *replicas):
                    one.step(chance)
                assert registrys.shows(await field.value("SELECT clock_timestamp()"))
                await field.all_used()
            for own, replica in zip(replicas, field.replicas, strict=True):
                own.set(1)
                _, now = await asyncio.to_thread(replica.leave)
                assert own.shows(now)
            field.check()


async def test_steps_of_the_registrys_clock_start_no_engine_twice_and_hold_none_up(
    tmp_path: Path, connect: Connect, seed: int, extent: Extent
) -> None:
    chance, engines = random.Random(seed), extent(5, 25)
    with ExitStack() as stack:
        # Not those of Provisioners: under the library Python's sleep may fail when a clock is set.
        registrys = stack.enter_context(clock())
        postgres = stack.enter_context(own_postgres(environment=registrys.environment))
        platform = stack.enter_context(running_platform(postgres.url, tmp_path, **COUNTED))
        clients = [connect(platform, platform.provisioner()) for _ in range(2)]
        product = await clients[0].register()
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for number in range(engines):
                user = User(chance.choice(clients), product, f"u{number}")
                booting = group.create_task(user.call("Provision"))
                registrys.step(chance)
                assert registrys.shows(platform.query("SELECT clock_timestamp()")[0][0])
                # Most boots take longer, and meet several steps.
                await asyncio.wait([booting], timeout=0.2)
        await asyncio.to_thread(oracle, platform)
        starts = [
            (platform.volume(engine_id) / "starts").read_text().splitlines()
            for (engine_id,) in platform.query("SELECT engine_id FROM engines")
        ]
        assert [len(one) for one in starts] == [1] * engines


async def test_what_was_leased_before_the_clock_was_set_back_is_taken_over_all_the_same(
    tmp_path: Path, connect: Connect
) -> None:
    with ExitStack() as stack:
        registrys = stack.enter_context(clock())
        postgres = stack.enter_context(own_postgres(environment=registrys.environment))
        platform = stack.enter_context(running_platform(postgres.url, tmp_path, **COUNTED))
        registrys.set(1)
        dead = platform.provisioner()
        clients = connect(platform, dead)
        booting = asyncio.ensure_future(User(clients, await clients.register()).call("Provision"))
        leased = "SELECT 1 FROM operations, loop_leases WHERE operations.owner IS NOT NULL HAVING count(*) = 5"
        await asyncio.to_thread(eventually, lambda: platform.query(leased), "all is leased")
        dead.kill()
        registrys.set(0)
        ahead = "SELECT 1 FROM loop_leases WHERE lease_until > clock_timestamp() + interval '1 minute'"
        assert platform.query(ahead)
        await asyncio.wait([booting])
        assert booting.exception() is not None
        platform.provisioner()
        await asyncio.to_thread(oracle, platform)
        await asyncio.to_thread(eventually, lambda: not platform.query(ahead), "every loop is led again")


class Registry(NamedTuple):
    """An empty one, and the clock that it goes by."""

    url: str
    database: Database
    clock: Clock


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    with clock() as own, own_postgres(environment=own.environment) as postgres:
        await migrate(postgres.url)
        database = Database(postgres.url, application_name="test")
        await database.open()
        yield Registry(postgres.url, database, own)
        await database.close()


async def test_a_boot_has_no_more_time_if_the_registrys_clock_is_set_back(registry: Registry) -> None:
    async def seconds_left() -> float:
        """By the next claim, of one Provisioner after the other."""
        store = operations(registry.database)
        (boot,) = await store.claim({Queue.BOOT: 1}, ())
        await store.release(boot, pause_s=0)
        return boot.seconds_left

    queue(registry.url, 1)
    registry.clock.set(1)
    assert 50 < await seconds_left() <= 60
    registry.clock.set(0)
    assert 50 < await seconds_left() <= 60
    registry.clock.set(20 / 3600)
    assert 30 < await seconds_left() <= 40


async def test_no_pause_is_longer_if_the_registrys_clock_is_set_back(registry: Registry) -> None:
    ports = PortAllocator("local", range(20000, 20001))
    health = HealthStore(registry.database, node="local", max_failures=1, restarts=RestartPolicy(60, 60, 2))

    async def over() -> tuple[bool, bool]:
        """Whether the engine's restart is due, and the port free."""
        async with registry.database.transaction() as tx:
            return await health.due_restarts(1) == [engine.engine_id], await ports.lease(tx, engine.engine_id) == 20000

    registry.clock.set(1)
    async with registry.database.transaction() as tx:
        await tx.execute(
            "WITH product AS (INSERT INTO products (product_id, slug, max_engines, allowed_images)"
            " VALUES (gen_random_uuid(), 'p', 1, '{}') RETURNING product_id)"
            " INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
            " SELECT gen_random_uuid(), product_id, 'u', 'running', 'engine:1', 'local', '', '' FROM product"
        )
        await ports.set_aside(tx, 20000)
    (engine,) = await health.running()
    assert await health.mark_ill(engine, "no answer", ended=True)
    assert await over() == (False, False)
    registry.clock.set(0)
    assert await over() == (True, True)


@pytest.mark.long
@pytest.mark.early(145)
@pytest.mark.figure(OVER)
@pytest.mark.figure(UNDER)
async def test_in_no_minute_more_than_the_limit_and_hardly_less_whatever_the_clocks_say(
    tmp_path: Path, connect: Connect, score: Score
) -> None:
    chance = random.Random(0)
    minutes, spread_s = 2, 10.0
    with ExitStack() as stack:
        registrys, *replicas = clocks(stack, REPLICAS)
        postgres = stack.enter_context(own_postgres(environment=registrys.environment))
        platform = stack.enter_context(running_platform(postgres.url, tmp_path))
        provisioner = platform.provisioner()
        addresses = []
        for own in replicas:
            own.set(1)
            admission = platform.admission(provisioner, **own.environment)
            assert own.shows(datetime.fromisoformat(admission.events()[-1]["timestamp"]))
            addresses.append(admission.address)
        product = await connect(platform, provisioner).register(rate_limit_rpm=LIMIT)
        load = Load(addresses, product, spread_s, minutes * MINUTE_S + spread_s + 4, [2] * REPLICAS, pause_s=0.2)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(load.run())
            while time.monotonic() < load.until - 5:
                await asyncio.wait([running], timeout=5)
                chance.choice(replicas).step(chance)
                await asyncio.wait([running], timeout=5)
                registrys.step(chance)
                assert registrys.shows(platform.query("SELECT clock_timestamp()")[0][0])
    over, unused = max(load.most_in_a_minute() - LIMIT, 0), max(1 - load.used(minutes), 0)
    score(OVER, f"{over}", not over)
    score(UNDER, f"{unused:.1%}", unused <= 0.01)
    assert not over
    assert unused <= 0.01
