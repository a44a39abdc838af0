"""The warm pool on real processes: whose engines come from it, and that none comes twice or dead."""

import asyncio
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import aiohttp
import grpc
import psutil
import psycopg
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.harness import Clients, Platform, Product, eventually, reason

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
NOTHING = {"rows": 0, "ports": 0, "processes": 0, "volumes": 0}


def pool_of(size: int, **settings: str) -> dict[str, str]:
    return {"ORCH_WARM_POOL_SIZE": str(size), "ORCH_OPERATION_LEASE_S": "1", **settings}


def ready(platform: Platform) -> list[str]:
    """Ids of the members that wait for an owner."""
    rows = platform.query("SELECT engine_id FROM engines WHERE product_id IS NULL AND status = 'running'")
    return [str(engine_id) for (engine_id,) in rows]


async def filled(platform: Platform, size: int) -> list[str]:
    def is_filled() -> bool:
        members = platform.query("SELECT count(*) FROM engines WHERE product_id IS NULL")[0][0]
        return members == len(ready(platform)) == size and platform.open_operations() == 0

    await asyncio.to_thread(eventually, is_filled, f"the pool has {size} engines that are ready")
    return ready(platform)


def member_process(platform: Platform, engine_id: str) -> psutil.Process:
    (process,) = [p for p in platform.engine_processes() if p.environ()["SEPTEMBER_ENGINE_ID"] == engine_id]
    return process


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def ensure(clients: Clients, product: Product, user_id: str) -> Any:
    request = pb.EnsureEngineRequest(user_id=user_id, auto_provision=True)
    return (await clients.provisioner.EnsureEngine(request, metadata=product.metadata)).engine


async def destroy(clients: Clients, product: Product, user_id: str) -> None:
    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id=user_id), metadata=product.metadata)


async def takes_its_key(engine: Any) -> bool:
    """Whether the engine answers, and knows the key that came with it."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{engine.url}/health") as response:
            if (await response.json())["status"] != "ok":
                return False
        body = {"conversation_id": "c1", "message": "hello"}
        headers = {"X-Engine-Key": engine.api_key}
        async with session.post(f"{engine.url}/execute", json=body, headers=headers) as response:
            return response.status == 200


async def test_a_new_user_gets_an_engine_of_the_pool_which_is_filled_again(
    platform: Platform, connect: Connect
) -> None:
    provisioner = platform.provisioner(**pool_of(2))
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    members = await filled(platform, 2)
    before = platform.query("SELECT max(created_at) FROM engines")[0][0]

    request = admission_pb.AdmitRequest(user_id="ada", auto_provision=True)
    answer = await clients.admission.Admit(request, metadata=product.metadata)
    assert answer.engine.engine_id in members
    assert answer.engine.user_id == "ada"
    assert answer.engine.created_at.ToDatetime(before.tzinfo) > before
    assert await takes_its_key(answer.engine)
    again = await clients.admission.Admit(request, metadata=product.metadata)
    assert again.engine.engine_id == answer.engine.engine_id
    events = platform.query(
        "SELECT action, actor, outcome, user_id, detail FROM audit_events WHERE action = 'provision'"
    )
    assert events == [("provision", f"product:{product.slug}", "succeeded", "ada", "from the warm pool")]

    await filled(platform, 2)
    assert platform.counts() == {"rows": 3, "ports": 3, "processes": 3, "volumes": 3}
    await destroy(clients, product, "ada")
    assert platform.counts() == {"rows": 2, "ports": 2, "processes": 2, "volumes": 2}
    assert answer.engine.engine_id not in ready(platform)


async def test_operators_see_the_pool_and_products_only_what_is_theirs(platform: Platform, connect: Connect) -> None:
    clients = connect(platform, platform.provisioner(**pool_of(2)))
    product = await clients.register()
    await filled(platform, 2)
    await ensure(clients, product, "ada")
    await filled(platform, 2)
    for key, sees in ((clients.admin, True), (product.metadata, False)):
        status = await clients.fleet.GetFleetStatus(fleet_pb.GetFleetStatusRequest(), metadata=key)
        assert (status.total, status.by_status["running"], status.HasField("warm_pool")) == (1, 1, sees)
        assert (status.warm_pool.ready, status.warm_pool.booting) == ((2, 0) if sees else (0, 0))
        metrics = await clients.fleet.GetFleetMetrics(fleet_pb.GetFleetMetricsRequest(), metadata=key)
        assert (metrics.total_provisions, metrics.provisions_1h, metrics.HasField("total_claims")) == (1, 1, sees)
        assert metrics.total_claims == (1 if sees else 0)
        engines = await clients.fleet.ListEngines(fleet_pb.ListEnginesRequest(), metadata=key)
        assert ([engine.user_id for engine in engines.engines], engines.total) == (["ada"], 1)


async def test_the_pool_takes_ports_but_nobodys_quota(platform: Platform, connect: Connect) -> None:
    ports = {"ORCH_PORT_MIN": "22100", "ORCH_PORT_MAX": "22102"}
    clients = connect(platform, platform.provisioner(**pool_of(2, **ports)))
    product = await clients.register(max_engines=1)
    await filled(platform, 2)
    others = await clients.register(allowed_images=["tests.engines.*"])
    request = pb.ProvisionEngineRequest(user_id="u1", engine_version="tests.engines.moody")
    await clients.provisioner.ProvisionEngine(request, metadata=others.metadata)
    request.user_id = "u2"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.provisioner.ProvisionEngine(request, metadata=others.metadata)
    assert reason(error.value) == "PORT_EXHAUSTION"

    await ensure(clients, product, "u1")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await ensure(clients, product, "u2")
    assert reason(error.value) == "QUOTA_EXCEEDED"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    assert reason(error.value) == "ENGINE_ALREADY_EXISTS"
    assert len(ready(platform)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_member_that_has_just_died_or_hangs_is_not_handed_out_but_replaced(
    platform: Platform, connect: Connect, number: signal.Signals
) -> None:
    clients = connect(platform, platform.provisioner(**pool_of(1)))
    product = await clients.register()
    (member,) = await filled(platform, 1)
    process = member_process(platform, member)
    process.send_signal(number)
    if number == signal.SIGKILL:
        await asyncio.to_thread(eventually, lambda: has_ended(process), "it is dead")
    engine = await ensure(clients, product, "ada")
    assert engine.engine_id != member
    assert await takes_its_key(engine)
    (new,) = await filled(platform, 1)
    assert new != member
    assert platform.counts() == {"rows": 2, "ports": 2, "processes": 2, "volumes": 2}


async def test_a_dead_member_is_replaced_before_anybody_asks(platform: Platform) -> None:
    platform.provisioner(**pool_of(2))
    members = await filled(platform, 2)
    member_process(platform, members[0]).kill()
    await asyncio.to_thread(
        eventually, lambda: len(ready(platform)) == 2 and members[0] not in ready(platform), "it is replaced"
    )
    assert members[1] in ready(platform)


async def test_sixty_four_callers_on_a_pool_of_eight_while_members_are_killed(
    platform: Platform, connect: Connect
) -> None:
    replicas = [connect(platform, platform.provisioner(**pool_of(8))) for _ in range(2)]
    product = await replicas[0].register(max_engines=64)
    await filled(platform, 8)
    killed: dict[str, datetime] = {}
    done = asyncio.Event()

    def kill_one() -> None:
        """Kills a member that nobody can claim meanwhile, and notes when it was dead."""
        with psycopg.connect(platform.database_url) as connection:
            row = connection.execute(
                "SELECT engine_id FROM engines WHERE product_id IS NULL AND status = 'running'"
                " ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED"
            ).fetchone()
            if row is not None:
                process = member_process(platform, str(row[0]))
                process.kill()
                eventually(lambda: has_ended(process), "it is dead")
                clock = connection.execute("SELECT clock_timestamp()").fetchone()
                assert clock is not None
                killed[str(row[0])] = clock[0]

    sizes: list[int] = []

    async def kill_and_count() -> None:
        count = "SELECT count(*) FROM engines WHERE product_id IS NULL AND status <> 'destroying'"
        while not done.is_set():
            sizes.append((await asyncio.to_thread(platform.query, count))[0][0])
            if len(killed) < 12:
                with suppress(ValueError, psutil.Error):  # It has ended already.
                    await asyncio.to_thread(kill_one)

    places = asyncio.Semaphore(16)

    async def call(index: int) -> Any:
        async with places:
            return await ensure(replicas[index % 2], product, f"u{index}")

    killer = asyncio.create_task(kill_and_count())
    engines = await asyncio.gather(*(call(i) for i in range(64)))
    done.set()
    await killer

    assert killed
    assert max(sizes) == 8
    assert len({engine.engine_id for engine in engines}) == 64
    begun = dict(
        platform.query(
            "SELECT engine_id::text, at - make_interval(secs => duration_ms / 1000.0) FROM audit_events"
            " WHERE action = 'provision' AND outcome = 'succeeded' AND detail = 'from the warm pool'"
        )
    )
    assert begun
    for engine in engines:
        if engine.engine_id in killed:
            # It can only have been killed after it was looked at.
            assert killed[engine.engine_id] > begun[engine.engine_id] - timedelta(milliseconds=1)
        else:
            assert await takes_its_key(engine)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await ensure(replicas[0], product, "one-more")
    assert reason(error.value) == "QUOTA_EXCEEDED"


async def test_members_of_another_image_and_those_too_many_are_drained(platform: Platform) -> None:
    first = platform.provisioner(**pool_of(3))
    before = await filled(platform, 3)
    assert first.terminate() == 0
    second = platform.provisioner(**pool_of(2, ORCH_ENGINE_IMAGE="tests.engines.moody"))
    after = await filled(platform, 2)
    assert not set(after) & set(before)
    assert platform.query("SELECT DISTINCT image FROM engines") == [("tests.engines.moody",)]
    assert platform.counts() == {"rows": 2, "ports": 2, "processes": 2, "volumes": 2}
    assert second.terminate() == 0
    platform.provisioner()
    await asyncio.to_thread(eventually, lambda: platform.counts() == NOTHING, "the pool is drained")


@pytest.mark.parametrize("seed", [1, 2])
async def test_kills_in_the_middle_of_filling_and_claiming_leave_nothing_over(
    platform: Platform, connect: Connect, seed: int
) -> None:
    chance = random.Random(seed)
    provisioner = platform.provisioner(**pool_of(4))
    product = await connect(platform, provisioner).register()

    async def live(clients: Clients, user_id: str) -> None:
        with suppress(grpc.aio.AioRpcError):
            await ensure(clients, product, user_id)
            if chance.random() < 0.5:
                await destroy(clients, product, user_id)

    for _ in range(4):
        clients = connect(platform, provisioner)
        lives = [asyncio.create_task(live(clients, f"u{i}")) for i in range(4)]
        # The moment is the point here, not a wait for anything.
        await asyncio.wait(lives, timeout=chance.uniform(0.02, 1.5))
        provisioner.kill()
        await asyncio.gather(*lives)
        # As if the time of its turn were over.
        platform.query("UPDATE loop_leases SET lease_until = '-infinity'")
        provisioner = platform.provisioner(**pool_of(4))
    await filled(platform, 4)
    counts = platform.counts()
    assert len(set(counts.values())) == 1, counts

    clients = connect(platform, provisioner)
    for (user_id,) in platform.query("SELECT user_id FROM engines WHERE product_id IS NOT NULL"):
        await destroy(clients, product, user_id)
    await filled(platform, 4)
    assert platform.counts() == {"rows": 4, "ports": 4, "processes": 4, "volumes": 4}
