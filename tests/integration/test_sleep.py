"""Idle engines are put to sleep, and never under anybody."""

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import grpc
import psutil
import pytest

from september.engine.v1 import denial_pb2, engine_pb2
from services.shared.failpoints import VARIABLE
from tests.harness import Clients, Platform, eventually, reason
from tests.integration.test_life_cycle import User, accepted, actions, execute, process_of

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason
QUICK = {"ORCH_SLEEP_CHECK_INTERVAL_S": "0.2", "ORCH_DEEP_SLEEP_AFTER_S": "3600"}


class Sleepers:
    """A platform whose engines fall asleep quickly."""

    def __init__(self, platform: Platform, connect: Connect, **settings: str) -> None:
        self.platform = platform
        self.provisioner = platform.provisioner(**{**QUICK, **settings})
        self.admissions = [platform.admission(self.provisioner) for _ in range(2)]
        self.clients = connect(platform, self.provisioner, *self.admissions)

    async def user(self, user_id: str = "u1", **policy: object) -> User:
        images = ["services.engine", "tests.engines.*"]
        product = await self.clients.register(allowed_images=images, **{"idle_sleep_after_s": 1, **policy})
        return User(self.clients, product, user_id)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        await asyncio.to_thread(eventually, condition, what)

    async def asleep(self, engine_id: str) -> psutil.Process | None:
        """Waits until the engine's sleep is over and done; returns its process."""
        await self.until(
            lambda: self.platform.query(
                "SELECT 1 FROM operations WHERE engine_id = %s AND kind = 'sleep' AND outcome = 'succeeded'",
                UUID(engine_id),
            ),
            "the engine sleeps",
        )
        return process_of(self.platform, engine_id)


@pytest.fixture
def sleepers(platform: Platform, connect: Connect) -> Sleepers:
    return Sleepers(platform, connect)


async def test_an_idle_engine_is_frozen_and_thawed_with_its_memory(sleepers: Sleepers) -> None:
    user = await sleepers.user()
    engine = (await user.admit(auto_provision=True, keep_awake_s=5)).engine
    await execute(engine.url, engine.api_key, "my name is Ada")
    process = await sleepers.asleep(engine.engine_id)
    assert process is not None
    assert process.status() == psutil.STATUS_STOPPED
    assert (await user.admit()).reason == REASON.engine_sleeping
    woken = (await user.admit(auto_wake=True, keep_awake_s=60)).engine
    assert (woken.engine_id, woken.status) == (engine.engine_id, STATUS.running)
    assert process_of(sleepers.platform, engine.engine_id) == process
    assert (await execute(woken.url, woken.api_key, "and who am I?"))[-1]["messages"] == 4


async def test_an_engine_without_a_policy_of_sleep_stays_awake(sleepers: Sleepers) -> None:
    awake = await sleepers.user(idle_sleep_after_s=None)
    kept = (await awake.admit(auto_provision=True)).engine
    other = await sleepers.user()
    await sleepers.asleep((await other.admit(auto_provision=True)).engine.engine_id)
    assert sleepers.platform.query("SELECT status FROM engines WHERE engine_id = %s", UUID(kept.engine_id)) == [
        ("running",)
    ]


async def test_an_engine_at_work_is_not_frozen_however_long_it_takes(sleepers: Sleepers) -> None:
    user = await sleepers.user()
    engine = (await user.admit(auto_provision=True, keep_awake_s=3)).engine
    done = (await execute(engine.url, engine.api_key, "take your time", delay_s=7))[-1]
    assert done["messages"] == 2
    rows = sleepers.platform.query(
        "SELECT count(*) FROM operations WHERE engine_id = %s AND kind = 'sleep' AND outcome = 'succeeded'"
        " AND finished_at < (SELECT busy_at FROM engines WHERE engine_id = %s)",
        UUID(engine.engine_id),
        UUID(engine.engine_id),
    )
    assert rows == [(0,)]
    [(busy,)] = sleepers.platform.query("SELECT busy_reason FROM engines WHERE engine_id = %s", UUID(engine.engine_id))
    assert "at work" in busy
    assert await sleepers.asleep(engine.engine_id) is not None


async def test_an_engine_whose_processor_works_is_busy_though_it_says_nothing(sleepers: Sleepers) -> None:
    user = await sleepers.user()
    made = await user.call("Provision", engine_version="tests.engines.busy")
    await sleepers.until(
        lambda: sleepers.platform.query(
            "SELECT 1 FROM engines WHERE engine_id = %s AND busy_reason LIKE '%%processor%%'", UUID(made.engine_id)
        ),
        "its work is noticed",
    )
    assert sleepers.platform.query(
        "SELECT count(*) FROM operations WHERE engine_id = %s AND kind = 'sleep' AND outcome = 'succeeded'",
        UUID(made.engine_id),
    ) == [(0,)]
    process = process_of(sleepers.platform, made.engine_id)
    assert process is not None
    assert process.status() != psutil.STATUS_STOPPED


async def test_a_caller_can_keep_an_engine_awake_within_its_policy(sleepers: Sleepers) -> None:
    held, cut = await sleepers.user(max_keep_awake_s=3600), await sleepers.user(max_keep_awake_s=0)
    kept = (await held.admit(auto_provision=True, keep_awake_s=600)).engine
    let_go = (await cut.admit(auto_provision=True, keep_awake_s=600)).engine
    await sleepers.asleep(let_go.engine_id)
    assert (await held.admit()).admitted
    assert sleepers.platform.query(
        "SELECT count(*) FROM operations WHERE engine_id = %s AND kind = 'sleep'", UUID(kept.engine_id)
    ) == [(0,)]


async def test_a_sleeper_gives_its_memory_back_and_is_started_when_wanted(platform: Platform, connect: Connect) -> None:
    sleepers = Sleepers(platform, connect, ORCH_DEEP_SLEEP_AFTER_S="1")
    user = await sleepers.user()
    engine = (await user.admit(auto_provision=True, keep_awake_s=5)).engine
    await execute(engine.url, engine.api_key, "my name is Ada")
    await sleepers.until(lambda: platform.query("SELECT 1 FROM engines WHERE deep_asleep"), "it sleeps deeply")
    assert process_of(platform, engine.engine_id) is None
    assert (await user.admit()).reason == REASON.engine_sleeping
    woken = (await user.admit(auto_wake=True, keep_awake_s=60)).engine
    assert woken.engine_id == engine.engine_id
    assert (await execute(woken.url, woken.api_key, "and who am I?"))[-1]["messages"] == 4
    assert platform.query("SELECT deep_asleep FROM engines") == [(False,)]


async def test_sleep_waits_for_a_replica_that_may_have_admitted(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    """One of another machine that is silent may hand engines out, as long as it may go on without the registry."""
    sleepers = Sleepers(platform, connect, ORCH_STALE_OK_S="1")
    other = platform.admission(sleepers.provisioner, ORCH_VAR_DIR=str(tmp_path / "other"))
    user = await sleepers.user()
    engine = (await user.admit(auto_provision=True)).engine
    other.kill()
    [(silent,)] = platform.query("SELECT min(flushed_at) FROM admission_replicas")
    await sleepers.asleep(engine.engine_id)
    [(asleep,)] = platform.query("SELECT finished_at FROM operations WHERE kind = 'sleep' AND outcome = 'succeeded'")
    assert (asleep - silent).total_seconds() > 11


async def test_an_engine_that_could_not_be_frozen_is_said_to_run(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    points = tmp_path / "failpoints"
    points.mkdir()
    (points / "sleep.frozen").symlink_to("SIGSTOP")
    sleepers = Sleepers(platform, connect, **{VARIABLE: str(points)})
    user = await sleepers.user(idle_sleep_after_s=None)
    made = await user.call("Provision")
    falling_asleep = asyncio.ensure_future(user.call("Sleep"))
    provisioner, process = psutil.Process(sleepers.provisioner.process.pid), process_of(platform, made.engine_id)
    assert process is not None
    await sleepers.until(lambda: provisioner.status() == psutil.STATUS_STOPPED, "the engine was frozen")
    # Nobody can know who sends signals to a process.
    os.killpg(process.pid, signal.SIGCONT)
    await sleepers.until(lambda: process.status() != psutil.STATUS_STOPPED, "it goes on")
    provisioner.send_signal(signal.SIGCONT)
    with pytest.raises(grpc.aio.AioRpcError, match="it could not be frozen") as refused:
        await falling_asleep
    assert reason(refused.value) == "UNAVAILABLE"
    assert platform.query("SELECT status, busy_reason FROM engines") == [
        ("running", "the engine stays awake: it could not be frozen")
    ]
    admitted = (await user.admit()).engine
    assert admitted.status == STATUS.running
    assert await accepted(admitted.url, admitted.api_key)
    assert process_of(platform, made.engine_id) == process


async def test_sleepers_are_not_probed_while_others_are(platform: Platform, connect: Connect) -> None:
    sleepers = Sleepers(platform, connect, ORCH_HEALTH_CHECK_INTERVAL_S="1", ORCH_HEALTH_MAX_FAILURES="1")
    awake = [await sleepers.user(f"u{n}", idle_sleep_after_s=None) for n in range(4)]
    asleep = await sleepers.user(idle_sleep_after_s=None)
    made, *_ = await asyncio.gather(*(user.call("Provision") for user in (asleep, *awake)))
    await execute(made.url, made.api_key, "my name is Ada")
    await asleep.sleep()
    process = process_of(platform, made.engine_id)
    probed = "SELECT FROM engines WHERE last_health_at > %s HAVING count(*) = 4"
    for _ in range(3):
        [(moment,)] = platform.query("SELECT clock_timestamp()")
        await sleepers.until(partial(platform.query, probed, moment), "the others are probed")
    assert process is not None
    assert process.status() == psutil.STATUS_STOPPED
    assert {action for action, _ in actions(platform, made.engine_id)} == {"provision", "sleep"}
    unheard = {"engine_frozen", "engine_ill", "prober_ill"}
    assert not [event for event in sleepers.provisioner.events() if event["event"] in unheard]
    woken = await asleep.call("Wake")
    assert process_of(platform, made.engine_id) == process
    assert (await execute(woken.url, made.api_key, "and who am I?"))[-1]["messages"] == 4
