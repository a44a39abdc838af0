"""Many who want the same thing at the same moment, of several Provisioners: one gets it, and no limit is passed."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import psutil
import psycopg
import pytest

from tests.chaos.oracle import oracle
from tests.chaos.racers import race
from tests.chaos.score_card import Score
from tests.harness import Clients, Platform, Product
from tests.integration.test_sleep import Sleepers, admits_against_sleep
from tests.integration.test_warm_pool import destroy, ensure, filled, pool_of, ready

pytestmark = pytest.mark.early

Connect = Callable[..., Clients]
Extent = Callable[[int, int], int]
REPLICAS, PROVISIONERS = 8, 3
TOGETHER = "wrong-tenant 200s; warm double claims; hangs in 10,000 sleep/admit races"
# It starts quickly, and there are many of them.
IMAGE = {"ORCH_ENGINE_IMAGE": "tests.engines.moody"}


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


async def test_of_all_who_want_a_users_engine_at_once_one_makes_it(
    platform: Platform, connect: Connect, score: Score, extent: Extent
) -> None:
    services = [platform.provisioner(**IMAGE) for _ in range(PROVISIONERS)]
    product = await connect(platform, *services).register()
    groups = [[f"u{turn}-{n}" for n in range(20)] for turn in range(extent(3, 50))]
    user_ids = [user_id for group in groups for user_id in group]
    got = await asyncio.to_thread(race, [service.address for service in services], product, [groups] * REPLICAS)
    # What every replica was given for a user is the same.
    differ = [user_id for user_id, given in zip(user_ids, zip(*got, strict=True), strict=True) if len(set(given)) > 1]
    made = dict(platform.query("SELECT user_id, count(*) FROM operations WHERE kind = 'provision' GROUP BY 1"))
    duplicates = len(differ) + sum(count - 1 for count in made.values())
    value = f"{duplicates} of {len(user_ids):,} users, {REPLICAS} callers of {len(services)} Provisioners at once"
    score("duplicate engines, 1,000 users × 8 replicas", value, duplicates == 0)
    assert (differ, made) == ([], dict.fromkeys(user_ids, 1))
    await asyncio.to_thread(oracle, platform)


async def test_a_product_is_never_seen_above_its_limit(
    platform: Platform, connect: Connect, score: Score, extent: Extent
) -> None:
    most = 5
    services = [platform.provisioner(**IMAGE) for _ in range(PROVISIONERS)]
    product = await connect(platform, *services).register(max_engines=most)
    turns = extent(3, 100)
    users = [[[f"u{turn}-{n}"] for turn in range(turns)] for n in range(REPLICAS)]
    async with sampled(platform, product) as samples:
        got = await asyncio.to_thread(race, [service.address for service in services], product, users)
    above = sum(n > most for n in samples)
    score("samples above `max_engines`", str(above), above == 0)
    assert max(samples) == most
    outcomes = Counter("made" if "-" in one else one for each in got for one in each)
    assert outcomes.keys() == {"made", "QUOTA_EXCEEDED"}
    assert outcomes["made"] >= most * turns
    await asyncio.to_thread(oracle, platform)


async def test_no_member_of_the_pool_is_given_twice_though_members_die(
    platform: Platform, connect: Connect, seed: int, score: Score, extent: Extent
) -> None:
    chance, size = random.Random(seed), 4
    services = [platform.provisioner(**pool_of(size, **IMAGE)) for _ in range(PROVISIONERS)]
    clients = [connect(platform, service) for service in services]
    # Boots of their own would only take time.
    product = await clients[0].register(max_engines=size)
    owners: Counter[str] = Counter()

    async def claim(user_id: str) -> str | None:
        with suppress(grpc.aio.AioRpcError):
            engine = await ensure(chance.choice(clients), product, user_id)
            owners[engine.engine_id] += 1
            return user_id
        return None

    for turn in range(extent(1, 20)):
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
    assert claimed[0][0] > 0
    await filled(platform, size)


async def test_nobody_who_is_admitted_hangs_or_finds_the_engine_of_another(
    platform: Platform, connect: Connect, score: Score, extent: Extent
) -> None:
    wrong = await admits_against_sleep(Sleepers(platform, connect), turns=extent(5, 500))
    strangers = sum("another" in one for one in wrong)
    score(TOGETHER, f"wrong tenants: {strangers}, hangs: {len(wrong) - strangers}", not wrong)
    assert wrong == []
