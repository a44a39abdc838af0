"""Engines that die, hang or never come back; and a prober that can't see them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import grpc
import psutil
import pytest

from september.engine.v1 import denial_pb2, engine_pb2
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.store.health import HealthStore
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Product, Service, eventually
from tests.integration.test_life_cycle import User, process_of

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason
FRAGILE, MOODY = "tests.engines.fragile", "tests.engines.moody"
QUICK = {
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_HEALTH_CHECK_TIMEOUT_S": "0.5",
    "ORCH_RESTART_BACKOFF_BASE_S": "0.1",
    # Nobody else is to see what these tests are about.
    "ORCH_RECONCILE_INTERVAL_S": "3600",
}


class Ward:
    """A platform that looks after its engines quickly, and a product on it."""

    platform: Platform
    provisioner: Service
    clients: Clients
    product: Product

    async def open(self, platform: Platform, connect: Connect, **settings: str) -> "Ward":
        self.platform = platform
        self.provisioner = platform.provisioner(**{**QUICK, **settings})
        self.clients = connect(platform, self.provisioner, platform.admission(self.provisioner))
        self.product = await self.clients.register(allowed_images=["services.engine", "tests.engines.*"])
        return self

    def user(self, user_id: str = "u1") -> User:
        return User(self.clients, self.product, user_id)

    async def provision(self, image: str = "", user_id: str = "u1") -> Any:
        return await self.user(user_id).call("Provision", engine_version=image)

    async def provision_many(self, count: int, image: str) -> list[Any]:
        return await asyncio.gather(*(self.provision(image, f"u{i}") for i in range(count)))

    def process(self, engine: Any) -> psutil.Process:
        process = process_of(self.platform, engine.engine_id)
        assert process is not None
        return process

    def volume(self, engine: Any) -> Path:
        return self.platform.directory / "var" / "engines" / str(engine.engine_id) / "data"

    def row(self, engine: Any, columns: str) -> tuple[Any, ...]:
        (row,) = self.platform.query(f"SELECT {columns} FROM engines WHERE engine_id = %s", UUID(engine.engine_id))
        return row

    def actions(self, engine: Any) -> list[str]:
        """What was done to the engine since it was made, by the audit log."""
        rows = self.platform.query(
            "SELECT action FROM audit_events WHERE engine_id = %s AND action <> 'provision' ORDER BY event_id",
            UUID(engine.engine_id),
        )
        return [action for (action,) in rows]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.provisioner.events() if event["event"] == name]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        await asyncio.to_thread(eventually, condition, what)

    async def back(self, engine: Any, since: psutil.Process) -> None:
        """Waits until the engine runs again, as another process than before."""
        await self.until(
            lambda: (
                self.row(engine, "status") == ("running",)
                and process_of(self.platform, engine.engine_id) not in (None, since)
            ),
            "the engine is back",
        )


@pytest.fixture
async def ward(platform: Platform, connect: Connect) -> Ward:
    return await Ward().open(platform, connect)


async def healthy(url: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
        return answer.status == 200


async def test_a_killed_engine_is_back_by_itself(ward: Ward) -> None:
    made = await ward.provision()
    before = ward.process(made)
    before.kill()
    answers = []
    while ward.actions(made)[-1:] != ["auto_restart_success"]:
        answers.append(await ward.user().admit())
    for answer in answers:
        # Not noticed yet, joined the restart, or in the moment between.
        if answer.admitted:
            assert (answer.engine.engine_id, answer.engine.api_key) == (made.engine_id, made.api_key)
        else:
            assert answer.reason == REASON.engine_unhealthy
    admitted = (await ward.user().admit()).engine
    assert (admitted.engine_id, admitted.api_key, admitted.status) == (made.engine_id, made.api_key, STATUS.running)
    assert await healthy(admitted.url)
    assert ward.process(made) != before
    assert ward.actions(made) == ["health_failed", "auto_restart_start", "auto_restart_success"]
    details = ward.platform.query("SELECT actor, detail FROM audit_events WHERE action = 'health_failed'")
    assert details == [("system", "its instance had ended")]


async def test_an_engine_that_always_fails_is_given_up_and_only_a_start_brings_it_back(
    platform: Platform, connect: Connect
) -> None:
    ward = await Ward().open(platform, connect, ORCH_RESTART_MAX_ATTEMPTS="3")
    made = await ward.provision(FRAGILE)
    ward.process(made).kill()
    await ward.until(lambda: "auto_restart_gave_up" in ward.actions(made), "it is given up")
    given_up = [
        "health_failed",
        *["auto_restart_start", "auto_restart_failed"] * 3,
        "auto_restart_gave_up",
    ]
    assert ward.actions(made) == given_up
    assert ward.row(made, "status, restart_attempts, restart_at") == ("failed", 3, None)
    assert (await ward.user().admit(auto_wake=True)).reason == REASON.engine_unhealthy
    pauses = ward.platform.query(
        "SELECT pause FROM (SELECT action, extract(epoch FROM at - lag(at) OVER (ORDER BY event_id))::float AS pause"
        " FROM audit_events) AS gaps WHERE action = 'auto_restart_start'"
    )
    assert all(pause >= 0.1 * 2**n for n, (pause,) in enumerate(pauses))

    with pytest.raises(grpc.aio.AioRpcError):
        await ward.user().call("Start")
    assert ward.row(made, "status, restart_at") == ("failed", None)
    (ward.volume(made) / "started").unlink()
    assert (await ward.user().call("Start")).url == made.url
    assert ward.row(made, "status, restart_attempts") == ("running", 0)
    assert (await ward.user().admit()).admitted
    assert ward.actions(made) == [*given_up, "start", "start", "start", "start"]


async def test_an_engine_that_recovers_is_admitted_within_a_second(ward: Ward) -> None:
    made = await ward.provision(FRAGILE)
    ward.process(made).kill()
    await ward.until(lambda: "auto_restart_failed" in ward.actions(made), "a restart fails")
    (ward.volume(made) / "started").unlink()
    async with asyncio.timeout(20):
        while not (await ward.user().admit()).admitted:
            pass
    admitted_at = time.time()
    ((finished_at,),) = ward.platform.query(
        "SELECT extract(epoch FROM at)::float FROM audit_events WHERE action = 'auto_restart_success'"
    )
    assert admitted_at - finished_at < 1
    assert ward.row(made, "status") == ("running",)


async def test_an_engine_that_boots_and_dies_again_and_again_is_given_up(platform: Platform, connect: Connect) -> None:
    ward = await Ward().open(platform, connect, ORCH_RESTART_MAX_ATTEMPTS="2")
    made = await ward.provision()
    for _ in range(2):
        before = ward.process(made)
        before.kill()
        await ward.back(made, before)
    ward.process(made).kill()
    await ward.until(lambda: ward.row(made, "status") == ("failed",), "it is failed")
    assert ward.actions(made) == [
        *["health_failed", "auto_restart_start", "auto_restart_success"] * 2,
        "health_failed",
        "auto_restart_gave_up",
    ]


async def test_restarts_are_forgotten_once_the_engine_was_well_for_long(platform: Platform, connect: Connect) -> None:
    ward = await Ward().open(platform, connect, ORCH_RESTART_BACKOFF_MAX_S="2")
    made = await ward.provision()
    before = ward.process(made)
    before.kill()
    await ward.back(made, before)
    assert "auto_restart_success" in ward.actions(made)
    await ward.until(lambda: ward.row(made, "restart_attempts") == (0,), "they are forgotten")
    assert ward.row(made, "last_health_at - status_since > interval '2 seconds'") == (True,)


async def test_an_engine_that_says_it_is_not_well_is_started_anew(ward: Ward) -> None:
    made = await ward.provision(MOODY)
    before = ward.process(made)
    (ward.volume(made) / "sick").touch()
    await ward.back(made, before)
    assert not before.is_running()
    assert ward.actions(made) == ["health_failed", "auto_restart_start", "auto_restart_success"]
    details = ward.platform.query("SELECT detail FROM audit_events WHERE action = 'health_failed'")
    assert details == [("it has failed 3 probes in a row",)]
    assert await healthy(made.url)


async def test_a_start_ends_what_still_runs_of_an_engine_that_was_given_up(
    platform: Platform, connect: Connect
) -> None:
    ward = await Ward().open(platform, connect, ORCH_RESTART_MAX_ATTEMPTS="1")
    made = await ward.provision(MOODY)
    before = ward.process(made)
    (ward.volume(made) / "sick").touch()
    await ward.back(made, before)
    before = ward.process(made)
    (ward.volume(made) / "sick").touch()
    await ward.until(lambda: "auto_restart_gave_up" in ward.actions(made), "it is given up")
    assert ward.process(made) == before
    assert (await ward.user().call("Start")).url == made.url
    assert ward.process(made) != before
    assert await healthy(made.url)


async def test_only_failures_in_a_row_count(ward: Ward) -> None:
    made = await ward.provision(MOODY)
    before = ward.process(made)
    for _ in range(2):
        (ward.volume(made) / "sick").touch()
        await ward.until(lambda: ward.row(made, "health_failures") == (2,), "two probes have failed")
        (ward.volume(made) / "sick").unlink()
        await ward.until(lambda: ward.row(made, "health_failures") == (0,), "a probe has not")
    assert ward.actions(made) == []
    assert ward.process(made) == before


async def test_nothing_is_restarted_when_the_prober_is_ill(ward: Ward) -> None:
    engines = await ward.provision_many(6, MOODY)
    processes = [ward.process(engine) for engine in engines]
    for engine in engines[:3]:
        (ward.volume(engine) / "mute").touch()
    await ward.until(lambda: len(ward.events("prober_ill")) > 4, "the prober is ill for longer than it may be")
    assert ward.events("prober_ill")[-1]["silent"] == 3
    # A sweep that came between the first of them and the third has counted one.
    assert ward.platform.query("SELECT DISTINCT status, health_failures < 2 FROM engines") == [("running", True)]
    for engine in engines[:3]:
        (ward.volume(engine) / "mute").unlink()
    ((moment,),) = ward.platform.query("SELECT clock_timestamp()")
    await ward.until(
        lambda: ward.platform.query("SELECT count(*) FROM engines WHERE last_health_at > %s", moment) == [(6,)],
        "all are well",
    )
    assert [ward.process(engine) for engine in engines] == processes
    assert not any(ward.actions(engine) for engine in engines)


async def test_one_silent_engine_among_others_is_restarted(ward: Ward) -> None:
    engines = await ward.provision_many(4, MOODY)
    processes = [ward.process(engine) for engine in engines]
    mute = ward.volume(engines[0]) / "mute"
    mute.touch()
    await ward.until(lambda: "health_failed" in ward.actions(engines[0]), "it is failed")
    mute.unlink()
    await ward.back(engines[0], processes[0])
    assert [ward.process(engine) for engine in engines[1:]] == processes[1:]
    assert not ward.events("prober_ill")


async def test_engines_that_died_together_are_all_started_again(ward: Ward) -> None:
    engines = await ward.provision_many(5, "")
    processes = [ward.process(engine) for engine in engines[:4]]
    for process in processes:
        process.kill()
    for engine, process in zip(engines[:4], processes, strict=True):
        await ward.back(engine, process)
    assert Counter(len(ward.actions(engine)) for engine in engines) == {3: 4, 0: 1}


async def test_a_probe_counts_once_and_only_for_the_engine_that_was_probed(
    platform: Platform, connect: Connect
) -> None:
    ward = await Ward().open(platform, connect, ORCH_HEALTH_CHECK_INTERVAL_S="3600")
    made = await ward.provision()
    database = Database(platform.database_url, application_name="test")
    await database.open()
    try:
        store = HealthStore(database, node="local", max_failures=2, restarts=RestartPolicy(0.1, 1, 3))
        (patient,) = await store.running()
        await ward.user().call("Stop")
        assert not await store.mark_ill(patient, "no answer", ended=True)
        await ward.user().call("Start")
        assert not await store.mark_ill(patient, "no answer", ended=True)
        assert ward.row(made, "status, health_failures") == ("running", 0)

        (patient,) = await store.running()
        # Two leaders at once.
        failed = await asyncio.gather(*(store.mark_ill(patient, "no answer", ended=False) for _ in range(8)))
        assert failed == [False] * 8
        assert ward.row(made, "health_failures") == (1,)

        (patient,) = await store.running()
        failed = await asyncio.gather(*(store.mark_ill(patient, "it had ended", ended=True) for _ in range(8)))
        assert Counter(failed) == {True: 1, False: 7}
        assert ward.actions(made).count("health_failed") == 1
    finally:
        await database.close()
