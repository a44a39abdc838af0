"""Docker hung or gone: running engines are admitted as quickly as ever, and what needs Docker is told in time."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from docker import APIClient

from services.shared.failpoints import Point
from tests.chaos.crew import Crew
from tests.chaos.load import Answer, admit
from tests.chaos.operations import OPERATIONS
from tests.chaos.oracle import oracle
from tests.chaos.outage import Callers, during
from tests.chaos.score_card import Score
from tests.chaos.subject import Subject
from tests.chaos.test_kills import KILLS
from tests.e2e.own_dockerd import OwnDockerd
from tests.e2e.test_docker import IMAGE, DockerPlatform, images
from tests.e2e.test_docker_restart import dockerd, platform_on
from tests.harness import Clients, eventually
from tests.integration.backend_rigs import until
from tests.integration.docker_daemon import docker_api

pytestmark = pytest.mark.early(20)

FIGURE = "dockerd stopped: change of admit p99"

__all__ = ["docker_api", "dockerd", "images"]

Connect = Callable[..., Clients]
Extent = Callable[[int, int], int]

# How long a call of Docker's may take; and some for a busy machine.
CALL_S = 30.0
TOLD_S = CALL_S + 10
WINDOW_S = 0.75
# As many as a Provisioner boots at once, and has threads for.
NEW = [f"new-{n}" for n in range(8)]


@pytest.fixture
def platform(database_url: str, tmp_path: Path, dockerd: OwnDockerd) -> Iterator[DockerPlatform]:
    with platform_on(
        dockerd,
        database_url,
        tmp_path,
        ORCH_PORT_MIN="28000",
        ORCH_PORT_MAX="28999",
        # Nothing looks after engines meanwhile: only the answers to calls are watched.
        ORCH_HEALTH_CHECK_INTERVAL_S="3600",
    ) as platform:
        yield platform


@contextmanager
def hung(dockerd: OwnDockerd) -> Iterator[None]:
    """Within the block it does nothing, and its connections stay open."""
    dockerd.process.send_signal(signal.SIGSTOP)
    yield
    dockerd.process.send_signal(signal.SIGCONT)


@contextmanager
def without_image(api: APIClient) -> Iterator[None]:
    """Within the block every new engine is refused as soon as Docker answers, and none is booted."""
    api.tag(IMAGE, "aside")
    api.remove_image(IMAGE)
    yield
    api.tag("aside", IMAGE)


@contextmanager
def first_of_all(pids: Iterable[int]) -> Iterator[None]:
    """Within the block these processes, and the test's, wait for no other of the machine, if the test may say so."""
    tasks = [int(task.name) for pid in (os.getpid(), *pids) for task in Path(f"/proc/{pid}/task").iterdir()]

    def schedule(policy: int, priority: int) -> None:
        for task in tasks:
            with suppress(ProcessLookupError, PermissionError):
                os.sched_setscheduler(task, policy, os.sched_param(priority))

    schedule(os.SCHED_RR | os.SCHED_RESET_ON_FORK, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


@pytest.mark.early(107)
@pytest.mark.figure(FIGURE)
async def test_of_a_docker_that_hangs_admits_of_running_engines_know_nothing(
    platform: DockerPlatform, dockerd: OwnDockerd, connect: Connect, score: Score, extent: Extent
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    callers = Callers(platform, clients, await clients.register(), [clients.admission])
    await callers.open()

    async def under_way() -> None:
        await asyncio.to_thread(eventually, lambda: platform.open_operations() == len(NEW), "all are under way")

    async def ended() -> None:
        await asyncio.to_thread(eventually, lambda: platform.open_operations() == 0, "every operation has ended")

    def ask(user_id: str) -> Awaitable[Answer]:
        return admit(clients.admission, callers.product, user_id, auto_provision=True, timeout_s=120)

    async def two_windows(begun: list[float]) -> None:
        for _ in range(2):
            begun.append(time.monotonic())
            await asyncio.sleep(WINDOW_S)

    hangs_for_s = extent(3, 38)
    calm: list[float] = []
    stuck: list[float] = []
    async with callers.load(300) as running:
        await running.goes_on()
        # In turns, and of each the median: what else the machine does comes upon both alike.
        with first_of_all(service.process.pid for service in platform.services), without_image(platform.api):
            for _ in range(extent(1, 14)):
                async with during(hung(dockerd)):
                    asked = asyncio.gather(*map(ask, NEW))
                    await under_way()
                    await two_windows(stuck)
                assert {answer.outcome for answer in await asked} == {"BACKEND_ERROR"}
                await ended()
                await two_windows(calm)
        # What is asked for now is carried out by Docker when nobody waits for it any more.
        async with during(hung(dockerd)):
            asked = asyncio.gather(*map(ask, NEW))
            await asyncio.sleep(hangs_for_s)
        for answer in await asked:
            assert answer.outcome == ("admitted" if hangs_for_s < CALL_S else "UNAVAILABLE")
            assert answer.took_s < TOLD_S
        await callers.recovery_s()
        assert {answer.outcome for answer in await asyncio.gather(*map(ask, NEW))} == {"admitted"}
    assert running.outcomes().keys() == {"admitted"}
    await ended()
    assert len(set(platform.counts().values())) == 1

    def p99_s(windows: Sequence[float]) -> float:
        return statistics.median(running.p99_s(since, since + WINDOW_S) for since in windows)

    change = p99_s(stuck) / p99_s(calm) - 1
    score(FIGURE, f"{change:+.0%}", change < 0.1)


@pytest.mark.long
async def test_without_docker_whoever_needs_it_is_told_in_time(
    platform: DockerPlatform, dockerd: OwnDockerd, connect: Connect
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    callers = Callers(platform, clients, await clients.register(), [clients.admission])
    await callers.open()
    async with callers.load(50) as running:
        dockerd.kill()
        for user_id in ("new", "newer"):
            answer = await admit(clients.admission, callers.product, user_id, auto_provision=True, timeout_s=TOLD_S)
            assert answer.outcome == "UNAVAILABLE"
        await asyncio.to_thread(dockerd.start)
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}


@pytest.mark.long
@pytest.mark.figure(KILLS)
async def test_a_daemon_killed_while_a_provisioner_stands_at_a_failpoint_costs_nothing(
    platform: DockerPlatform, dockerd: OwnDockerd
) -> None:
    platform.environment["ORCH_RECONCILE_INTERVAL_S"] = "2"
    crew = Crew(platform)
    await crew.muster(1)
    product = await crew.clients()[0].register()
    for name, point in (
        ("provision", "boot.created"),
        ("provision", "boot.starting"),
        ("start", "boot.started"),
        ("wake", "boot.thawed"),
        ("stop", "stop.signalled"),
        ("destroy", "docker.container_removed"),
    ):
        operation, subject = OPERATIONS[name], Subject(crew, product)
        await subject.prepare(*operation.prepared)
        crew.break_at(cast(Point, point), "SIGSTOP")
        async with asyncio.TaskGroup() as group:
            group.create_task(subject.call(operation.call))
            stopped = await crew.broken(cast(Point, point))
            await asyncio.to_thread(dockerd.kill)
            await asyncio.to_thread(dockerd.start)
            stopped.process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(eventually, partial(subject.is_settled, operation.after), f"{point} is survived", 60)
        oracle(platform)

        async def answers(subject: Subject = subject, case: str = f"{name}, {point}") -> bool:
            # One that ended with the daemon has its row until the reconciler starts it.
            with suppress(aiohttp.ClientConnectionError):
                assert not await subject.lost(), case
                return True
            return False

        await until(answers)
        await subject.end()
    await crew.close()
