"""Start, stop, sleep, wake, rotate, watch: each call on a real engine, with what it may not do."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import aiohttp
import grpc
import psutil
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.harness import Clients, Platform, Product, Service, eventually, reason

Shared = tuple[Platform, list[Service]]
Connect = Callable[..., Clients]
STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason
REQUESTS = {
    "Provision": pb.ProvisionEngineRequest,
    "Start": pb.StartEngineRequest,
    "Stop": pb.StopEngineRequest,
    "Sleep": pb.SleepEngineRequest,
    "Wake": pb.WakeEngineRequest,
    "Destroy": pb.DestroyEngineRequest,
}


class User:
    """One user of a product, and all that can be done with their engine."""

    def __init__(self, clients: Clients, product: Product, user_id: str = "u1") -> None:
        self.clients = clients
        self.product = product
        self.user_id = user_id

    async def call(self, verb: str, **fields: Any) -> Any:
        request = REQUESTS[verb](user_id=self.user_id, **fields)
        return await getattr(self.clients.provisioner, f"{verb}Engine")(request, metadata=self.product.metadata)

    async def sleep(self) -> Any:
        """Puts the engine to sleep, as soon as it may: not under those who have just been let in."""
        async with asyncio.timeout(20):
            while True:
                try:
                    return await self.call("Sleep")
                except grpc.aio.AioRpcError as error:
                    if reason(error) != "UNAVAILABLE":
                        raise

    async def rotate(self) -> str:
        request = pb.RotateEngineKeyRequest(user_id=self.user_id)
        answer = await self.clients.provisioner.RotateEngineKey(request, metadata=self.product.metadata)
        return answer.api_key

    async def admit(self, **flags: Any) -> admission_pb.AdmitResponse:
        request = admission_pb.AdmitRequest(user_id=self.user_id, **flags)
        return await self.clients.admission.Admit(request, metadata=self.product.metadata)

    async def refused(self, verb: str) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await (self.rotate() if verb == "Rotate" else self.call(verb))
        return reason(error.value)


@pytest.fixture
async def user(clients: Clients) -> User:
    return User(clients, await clients.register(allowed_images=["services.engine", "tests.engines.*"]))


def process_of(platform: Platform, engine_id: str) -> psutil.Process | None:
    for process in platform.engine_processes():
        with suppress(psutil.Error):  # It may end any time.
            if process.environ()["SEPTEMBER_ENGINE_ID"] == engine_id:
                return process
    return None


async def execute(url: str, key: str, message: str, **fields: Any) -> list[dict[str, Any]]:
    """The data of a turn's events."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/execute", json={"message": message, **fields}, headers={"X-Engine-Key": key}) as answer,
    ):
        answer.raise_for_status()
        lines = (await answer.text()).splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


async def accepted(url: str, key: str) -> bool:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/execute", json={"message": "hello"}, headers={"X-Engine-Key": key}) as answer,
    ):
        return answer.status == 200


def actions(platform: Platform, engine_id: str) -> list[tuple[str, str]]:
    return [
        (action, outcome)
        for action, outcome in platform.query(
            "SELECT action, outcome FROM audit_events WHERE engine_id = %s AND outcome <> 'requested'"
            " ORDER BY event_id",
            UUID(engine_id),
        )
    ]


async def test_an_engine_stops_and_starts_with_its_memory(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    await execute(made.url, made.api_key, "my name is Ada")
    assert (await user.call("Stop")).status == STATUS.stopped
    assert process_of(shared[0], made.engine_id) is None
    assert (await user.admit(auto_wake=True)).reason == REASON.engine_sleeping

    started = await user.call("Start")
    assert (started.status, started.url) == (STATUS.running, made.url)
    done = (await execute(made.url, made.api_key, "and who am I?"))[-1]
    assert done["messages"] == 4
    assert actions(shared[0], made.engine_id) == [
        ("provision", "succeeded"),
        ("stop", "succeeded"),
        ("start", "succeeded"),
    ]
    durations = shared[0].query(
        "SELECT duration_ms FROM audit_events WHERE engine_id = %s AND outcome = 'succeeded'", UUID(made.engine_id)
    )
    assert all(duration is not None for (duration,) in durations)


async def test_an_engine_sleeps_and_wakes_where_it_was(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    before = process_of(shared[0], made.engine_id)
    assert before is not None
    assert (await user.call("Sleep")).status == STATUS.sleeping
    assert before.status() == psutil.STATUS_STOPPED
    assert (await user.admit()).reason == REASON.engine_sleeping

    assert (await user.call("Wake")).url == made.url
    after = process_of(shared[0], made.engine_id)
    assert after == before
    assert after.status() != psutil.STATUS_STOPPED
    assert (await user.admit()).admitted


@pytest.mark.parametrize(
    ("before", "refusals"),
    [
        (["Provision"], {"Start": "ENGINE_ALREADY_RUNNING", "Wake": "ENGINE_ALREADY_RUNNING"}),
        (["Provision", "Stop"], dict.fromkeys(("Stop", "Sleep", "Wake", "Rotate"), "ENGINE_NOT_RUNNING")),
        (["Provision", "Sleep"], dict.fromkeys(("Sleep", "Rotate"), "ENGINE_NOT_RUNNING")),
        ([], dict.fromkeys(("Start", "Stop", "Sleep", "Wake", "Rotate", "Destroy"), "ENGINE_NOT_FOUND")),
    ],
    ids=["running", "stopped", "sleeping", "none"],
)
async def test_what_an_engine_cannot_do_now_is_refused(user: User, before: list[str], refusals: dict[str, str]) -> None:
    for verb in before:
        await user.call(verb)
    assert {verb: await user.refused(verb) for verb in refusals} == refusals


async def test_a_sleeper_can_be_started_stopped_and_destroyed(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    await user.call("Sleep")
    assert (await user.call("Start")).status == STATUS.running
    await user.call("Sleep")
    assert (await user.call("Stop")).status == STATUS.stopped
    assert process_of(shared[0], made.engine_id) is None
    await user.call("Destroy")
    assert shared[0].query("SELECT 1 FROM port_leases WHERE engine_id = %s", UUID(made.engine_id)) == []


async def test_a_busy_engine_is_not_put_to_sleep(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    turn = asyncio.create_task(execute(made.url, made.api_key, "take your time", delay_s=5))

    async def active() -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{made.url}/health") as answer:
            return bool((await answer.json())["active"])

    while not await active():
        assert not turn.done()
    assert await user.refused("Sleep") == "UNAVAILABLE"
    assert (await user.admit()).admitted
    assert (await turn)[-1]["messages"] == 2


async def test_a_rotated_key_replaces_the_old_one_without_a_gap(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    process = process_of(shared[0], made.engine_id)
    new_key = await user.rotate()
    assert new_key != made.api_key
    assert (await user.admit()).engine.api_key == new_key
    # Both for a while; and nothing was started anew for it.
    assert await accepted(made.url, new_key)
    assert await accepted(made.url, made.api_key)
    assert process_of(shared[0], made.engine_id) == process

    await user.sleep()
    await user.call("Wake")
    assert process_of(shared[0], made.engine_id) == process
    await user.call("Stop")
    await user.call("Start")
    assert await accepted(made.url, new_key)
    assert not await accepted(made.url, made.api_key)


async def test_an_engine_that_knows_nothing_of_rotation_is_made_anew_on_its_volume(user: User, shared: Shared) -> None:
    made = await user.call("Provision", engine_version="tests.engines.no_rotation")
    await execute(made.url, made.api_key, "my name is Ada")
    process = process_of(shared[0], made.engine_id)
    new_key = await user.rotate()
    assert process_of(shared[0], made.engine_id) != process
    assert (await execute(made.url, new_key, "and who am I?"))[-1]["messages"] == 4
    assert not await accepted(made.url, made.api_key)
    assert (await user.admit()).engine.api_key == new_key


async def test_calls_at_once_on_one_engine_happen_one_after_the_other(user: User, shared: Shared) -> None:
    made = await user.call("Provision")
    verbs = ["Stop", "Start", "Sleep", "Wake", "Stop", "Start", "Sleep", "Wake"] * 2
    answers = await asyncio.gather(*(user.call(verb) for verb in verbs), user.rotate(), return_exceptions=True)
    allowed = {"ENGINE_NOT_RUNNING", "ENGINE_ALREADY_RUNNING", "UNAVAILABLE"}
    assert {reason(a) for a in answers if isinstance(a, grpc.aio.AioRpcError)} <= allowed
    assert not [a for a in answers if isinstance(a, BaseException) and not isinstance(a, grpc.aio.AioRpcError)]
    platform = shared[0]
    await asyncio.to_thread(
        eventually,
        lambda: (
            not platform.query(
                "SELECT 1 FROM operations WHERE engine_id = %s AND finished_at IS NULL", UUID(made.engine_id)
            )
        ),
        "nothing is under way",
    )
    [(status,)] = platform.query("SELECT status FROM engines WHERE engine_id = %s", UUID(made.engine_id))
    process = process_of(platform, made.engine_id)
    is_there = {"running": True, "sleeping": True, "stopped": False}
    assert (process is not None) is is_there[status]
    if process is not None:
        assert (process.status() == psutil.STATUS_STOPPED) is (status == "sleeping")


class Watched:
    """What a watcher has been told so far."""

    def __init__(self, user: User) -> None:
        call = user.clients.provisioner.WatchEngine(
            pb.WatchEngineRequest(user_id=user.user_id), metadata=user.product.metadata
        )
        self.call = call
        self.answers: AsyncIterator[pb.WatchEngineResponse] = aiter(call)

    async def until(self, status: int, step: str = "") -> list[str]:
        """The steps seen until a status, with nothing being done."""
        steps = []
        async with asyncio.timeout(20):
            while True:
                answer = await anext(self.answers)
                steps.append(answer.step)
                if answer.status == status and answer.step == step:
                    return steps


async def test_a_watcher_sees_the_steps_of_a_boot_and_the_end(user: User) -> None:
    boot = asyncio.create_task(user.call("Provision", engine_version="tests.engines.slow_boot"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await anext(Watched(User(user.clients, user.product, "nobody")).answers)
    assert reason(error.value) == "ENGINE_NOT_FOUND"
    while True:
        try:
            watched = Watched(user)
            first = await anext(watched.answers)
            break
        except grpc.aio.AioRpcError as early:
            if reason(early) != "ENGINE_NOT_FOUND":
                raise
    assert first.status == STATUS.provisioning
    steps = [first.step, *await watched.until(STATUS.running)]
    await boot
    probes = [step for step in steps if step.startswith("probing ")]
    assert len(probes) > 1
    assert probes == sorted(probes, key=lambda step: int(step.split()[1]))

    await user.call("Sleep")
    assert "announced" in await watched.until(STATUS.sleeping)
    await user.call("Destroy")
    rest = [answer async for answer in watched.answers]
    assert all(answer.status in (STATUS.sleeping, STATUS.destroying) for answer in rest)


async def test_a_watcher_that_leaves_is_let_go(user: User) -> None:
    await user.call("Provision")
    watched = Watched(user)
    await anext(watched.answers)
    watched.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(watched.answers)
    assert (await user.call("Stop")).status == STATUS.stopped


async def test_an_engine_keeps_its_memory_when_it_wakes_after_a_rotation(user: User, shared: Shared) -> None:
    """Thawed already, of an older generation than its row, and taken as it is by whoever goes on with the wake."""
    made = await user.call("Provision")
    process = process_of(shared[0], made.engine_id)
    assert process is not None
    await user.rotate()
    await user.sleep()
    process.resume()
    await user.call("Wake")
    assert process_of(shared[0], made.engine_id) == process


async def test_an_engine_that_does_not_answer_is_not_taken_for_idle(user: User, shared: Shared) -> None:
    made = await user.call("Provision", engine_version="tests.engines.silent")
    assert await user.refused("Sleep") == "UNAVAILABLE"
    process = process_of(shared[0], made.engine_id)
    assert process is not None
    assert process.status() != psutil.STATUS_STOPPED


async def test_an_existing_engine_is_woken_whatever_may_be_provisioned_now(clients: Clients) -> None:
    user = User(clients, await clients.register(allowed_images=["tests.engines.*"]))
    await user.call("Provision", engine_version="tests.engines.no_rotation")
    await user.sleep()
    assert (await user.admit(auto_provision=True, auto_wake=True)).admitted
    other = User(clients, user.product, "u2")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await other.admit(auto_provision=True)
    assert reason(error.value) == "POLICY_DENIED"


RUNS, RUNS_NOT = "ENGINE_ALREADY_RUNNING", "ENGINE_NOT_RUNNING"


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        ("running", {"Start": RUNS, "Wake": RUNS}),
        ("sleeping", {"Sleep": RUNS_NOT, "Rotate": RUNS_NOT}),
        ("stopped", {"Stop": RUNS_NOT, "Sleep": RUNS_NOT, "Wake": RUNS_NOT, "Rotate": RUNS_NOT}),
        ("failed", {"Sleep": RUNS_NOT, "Wake": RUNS_NOT, "Rotate": RUNS_NOT}),
    ],
)
async def test_in_every_status_all_that_is_asked_is_done_or_refused_in_time_and_destroy_is_legal_after_it(
    status: str, refused: dict[str, str], clients: Clients, shared: Shared
) -> None:
    product = await clients.register()

    async def refusal(verb: str) -> str | None:
        user = User(clients, product, verb)
        made = await user.call("Provision")
        if status == "sleeping":
            await user.sleep()
        elif status == "stopped":
            await user.call("Stop")
        shared[0].query("UPDATE engines SET status = %s WHERE engine_id = %s", status, UUID(made.engine_id))
        calls = {"Sleep": user.sleep, "Rotate": user.rotate, "Admit": user.admit}
        try:
            async with asyncio.timeout(10):
                await (calls[verb]() if verb in calls else user.call(verb))
            return None
        except grpc.aio.AioRpcError as error:
            return reason(error)
        finally:
            await user.call("Destroy")

    verbs = ("Start", "Stop", "Sleep", "Wake", "Rotate", "Admit")
    refusals = dict(zip(verbs, await asyncio.gather(*map(refusal, verbs)), strict=True))
    assert {verb: code for verb, code in refusals.items() if code} == refused
