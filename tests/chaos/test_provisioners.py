"""Several Provisioners, any of them killed, stopped or cut off: others take over, and who comes back does no harm."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import grpc
import pytest

from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.chaos.oracle import oracle
from tests.chaos.wire import Wire, wire
from tests.harness import Clients, Platform, Product, Service, eventually
from tests.integration.test_life_cycle import process_of

LEASE_S = 1.0
# From the moment that a Provisioner is gone until somebody has done what it was doing, a boot included.
TAKEN_OVER_S = LEASE_S + 15
SETTINGS = {
    "ORCH_OPERATION_LEASE_S": str(LEASE_S),
    "ORCH_RECONCILE_INTERVAL_S": "1",
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_SLEEP_CHECK_INTERVAL_S": "0.5",
}
COUNTED, MOODY = "tests.engines.counted", "tests.engines.moody"


class Member:
    """One of several Provisioners, behind a wire of its own."""

    def __init__(self, platform: Platform, near: Wire, settings: dict[str, str]) -> None:
        self._platform = platform
        self.wire = near
        self._settings = {**SETTINGS, "ORCH_DATABASE_URL": near.url, **settings}
        self._every_clients: list[Clients] = []

    async def start(self) -> None:
        self.service: Service = await asyncio.to_thread(self._platform.provisioner, **self._settings)
        self._every_clients.append(Clients(self._platform, self.service.address))

    @property
    def clients(self) -> Clients:
        return self._every_clients[-1]

    async def close(self) -> None:
        """Makes it able to end."""
        for clients in self._every_clients:
            await clients.close()
        with suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.wire.join()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.service.process.pid, number)

    async def lose(self, how: str) -> Callable[[], Awaitable[None]]:
        """Loses it; what is returned brings it back."""
        match how:
            case "killed":
                self.service.kill()
                return self.start
            case "stopped":
                await asyncio.to_thread(self.service.stall)
                return self._cont
            case _:
                self.wire.part()
                return self._join

    async def _cont(self) -> None:
        self.signal(signal.SIGCONT)

    async def _join(self) -> None:
        self.wire.join()

    def leads(self, loop: str) -> bool:
        """Whether it was the last to say so, of what it has logged."""
        turns = [
            event["event"]
            for event in self.service.events()
            if event["event"] in ("loop_led", "loop_lost") and event["loop"] == loop
        ]
        return turns[-1:] == ["loop_led"]

    def lost(self, loop: str) -> bool:
        return any(event["event"] == "loop_lost" and event["loop"] == loop for event in self.service.events())


Call = Callable[..., Coroutine[Any, Any, Any]]
Muster = Callable[..., Awaitable[list[Member]]]


@pytest.fixture
async def muster(platform: Platform) -> AsyncIterator[Muster]:
    """Starts so many Provisioners."""
    async with AsyncExitStack() as stack:
        members: list[Member] = []

        async def muster(size: int, **settings: str) -> list[Member]:
            for _ in range(size):
                member = Member(platform, await stack.enter_async_context(wire(platform)), settings)
                await member.start()
                members.append(member)
            return members

        yield muster
        for member in members:
            await member.close()
        # While their wires are whole, and are carried on.
        await asyncio.to_thread(platform.close)


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(eventually, condition, what, TAKEN_OVER_S)


def leader(members: list[Member], loop: str) -> Member:
    return next(member for member in members if member.leads(loop))


@pytest.mark.parametrize("how", ["stopped", "cut off"])
async def test_a_leader_lost_in_the_middle_of_a_sweep_fails_nobody_when_it_comes_back(
    platform: Platform, muster: Muster, how: str
) -> None:
    settings = {"ORCH_HEALTH_MAX_FAILURES": "1", "ORCH_HEALTH_CHECK_TIMEOUT_S": "4"}
    (first,) = await muster(1, **settings)
    product = await first.clients.register(allowed_images=["tests.engines.*"])
    made = await first.clients.provisioner.ProvisionEngine(
        pb.ProvisionEngineRequest(user_id="u1", engine_version=MOODY), metadata=product.metadata
    )
    process = process_of(platform, made.engine_id)
    assert process is not None
    mute = platform.directory / "var" / "engines" / made.engine_id / "data" / "mute"
    mute.touch()
    # Asked, and without an answer until its time is over: that counts as a failure, and one is enough.
    await until(lambda: any(c.status == "ESTABLISHED" for c in process.net_connections("tcp")), "it is being probed")
    back = await first.lose(how)
    mute.unlink()
    first, second = await muster(1, **settings)
    await until(lambda: second.leads("health:local"), "the second leads")
    well = "SELECT last_health_at FROM engines"
    before = platform.query(well)
    await until(lambda: platform.query(well) > before, "the second has found the engine well")
    await back()
    await until(lambda: first.lost("health:local"), "the first has noticed")
    failed = "SELECT count(*) FROM audit_events WHERE action = 'health_failed'"
    assert (platform.query("SELECT health_failures FROM engines"), platform.query(failed)) == ([(0,)], [(0,)])
    assert process_of(platform, made.engine_id) == process
    # It is as good as any other: once the second is gone, it leads again.
    await second.lose("killed")
    await until(lambda: first.leads("health:local"), "the first leads again")
    await asyncio.to_thread(oracle, platform)


@pytest.mark.parametrize("how", ["killed", "stopped", "cut off"])
async def test_whoever_leads_the_reconciler_is_replaced_within_a_lease(
    platform: Platform, muster: Muster, how: str
) -> None:
    members = await muster(2)
    product = await members[0].clients.register(allowed_images=["tests.engines.*"])
    made = await members[0].clients.provisioner.ProvisionEngine(
        pb.ProvisionEngineRequest(user_id="u1", engine_version=COUNTED), metadata=product.metadata
    )
    await until(lambda: any(member.leads("reconciler:local") for member in members), "one leads")
    lost = leader(members, "reconciler:local")
    (other,) = (member for member in members if member is not lost)
    back = await lost.lose(how)
    process = process_of(platform, made.engine_id)
    assert process is not None
    process.kill()
    await until(lambda: process_of(platform, made.engine_id) not in (None, process), "the engine is back")
    assert other.leads("reconciler:local")
    await back()
    if how != "killed":
        await until(lambda: lost.lost("reconciler:local"), "it has noticed")
    await asyncio.to_thread(oracle, platform)
    assert len(starts(platform, made.engine_id)) == 2


def starts(platform: Platform, engine_id: str) -> list[str]:
    """Processes that the engine was started as, ever."""
    return (platform.directory / "var" / "engines" / engine_id / "data" / "starts").read_text().split()


@pytest.mark.early(30)
async def test_no_effect_is_doubled_whoever_is_lost_and_comes_back(
    platform: Platform, muster: Muster, seed: int, extent: Callable[[int, int], int]
) -> None:
    """Users come, sleep, wake and go, while one Provisioner after the other is lost for longer than its lease."""
    chance = random.Random(seed)
    members = await muster(3, ORCH_WARM_POOL_SIZE="2", ORCH_ENGINE_IMAGE=COUNTED)
    product = await members[0].clients.register(max_engines=1000)
    lost: set[Member] = set()
    done = asyncio.Event()

    async def call(verb: str, user_id: str, **fields: Any) -> Any:
        """Calls until there is an answer, of whoever is there to give it."""
        request = getattr(pb, f"{verb}EngineRequest")(user_id=user_id, **fields)
        async with asyncio.timeout(60):
            while True:
                member = chance.choice([member for member in members if member not in lost])
                with suppress(grpc.aio.AioRpcError):
                    return await getattr(member.clients.provisioner, f"{verb}Engine")(
                        request, metadata=product.metadata, timeout=5
                    )
                await asyncio.sleep(0.05)

    async def live(name: str) -> int:
        lives = 0
        while not done.is_set():
            user_id = f"{name}-{lives}"
            made = (await call("Ensure", user_id, auto_provision=True)).engine
            if chance.random() < 0.5:
                await asked_to_sleep(members, lost, product, user_id)
                woken = (await call("Ensure", user_id, auto_wake=True)).engine
                assert (woken.engine_id, woken.api_key) == (made.engine_id, made.api_key)
            assert len(starts(platform, made.engine_id)) == 1
            await destroyed(call, platform, made.engine_id, user_id)
            lives += 1
        return lives

    lives = [asyncio.create_task(live(f"u{n}")) for n in range(4)]
    for _ in range(extent(2, 6)):
        member = chance.choice(members)
        lost.add(member)
        # The moment is the point here, not a wait for anything.
        await asyncio.sleep(chance.uniform(0, 0.5))
        back = await member.lose(chance.choice(["killed", "stopped", "cut off"]))
        [(since,)] = platform.query("SELECT clock_timestamp()")
        await until(partial(nothing_stale, platform, since), "others have taken over")
        await back()
        lost.discard(member)
    done.set()
    assert sum(await asyncio.gather(*lives)) > 0
    provisions = platform.query(
        "SELECT count(*) FROM audit_events WHERE action = 'provision' AND outcome = 'succeeded'"
        " GROUP BY engine_id HAVING count(*) > 1"
    )
    assert provisions == []
    pool = "SELECT count(*) FROM engines WHERE status = 'running'"
    await until(lambda: platform.query(pool) == [(2,)], "the pool is full")
    assert all(len(starts(platform, str(e))) == 1 for (e,) in platform.query("SELECT engine_id FROM engines"))
    await asyncio.to_thread(oracle, platform)


def nothing_stale(platform: Platform, since: datetime) -> bool:
    """Whether all that was begun before that moment has ended."""
    return not platform.query("SELECT 1 FROM operations WHERE finished_at IS NULL AND created_at < %s", since)


async def asked_to_sleep(members: list[Member], lost: set[Member], product: Product, user_id: str) -> None:
    """Asks for sleep, wherever; it may be refused, and its answer may be lost."""
    member = next(member for member in members if member not in lost)
    with suppress(grpc.aio.AioRpcError):
        await member.clients.provisioner.SleepEngine(
            pb.SleepEngineRequest(user_id=user_id), metadata=product.metadata, timeout=5
        )


def exists(platform: Platform, engine_id: str) -> bool:
    return bool(platform.query("SELECT 1 FROM engines WHERE engine_id = %s", UUID(engine_id)))


async def destroyed(call: Call, platform: Platform, engine_id: str, user_id: str) -> None:
    """Destroys the engine; a call whose answer was lost may have done it already."""
    destroying = asyncio.create_task(call("Destroy", user_id))
    while not destroying.done() and await asyncio.to_thread(exists, platform, engine_id):
        await asyncio.wait([destroying], timeout=0.2)
    destroying.cancel()
    await asyncio.gather(destroying, return_exceptions=True)
