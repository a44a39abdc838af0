"""SIGKILL at every failpoint of every operation: the next Provisioner finishes it, and nothing is lost or left over.

SIGSTOP at some of them, past the lease: the other one finishes it, and the one that goes on then does no harm.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple, get_args

import pytest

from services.shared.failpoints import Point
from tests.chaos.crew import Crew
from tests.chaos.operations import ELSEWHERE, OPERATIONS, Case, Operation, cases
from tests.chaos.oracle import oracle
from tests.chaos.score_card import SEEDS, Score
from tests.chaos.subject import Subject
from tests.harness import Product, eventually, new_database, ports_from, running_platform

pytestmark = pytest.mark.early(20)

KILLS = "kill -9 at every failpoint, of each process and of dockerd"
CONVERGENCE = "convergence after a kill, p99"
LOST = "acknowledged operations lost; volumes lost"

RECONCILE_S = 2
SETTINGS = {
    "ORCH_RECONCILE_INTERVAL_S": str(RECONCILE_S),
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_HEALTH_MAX_FAILURES": "1",
    "ORCH_RESTART_BACKOFF_BASE_S": "0.1",
    "ORCH_RESTART_MAX_ATTEMPTS": "2",
    "ORCH_SLEEP_CHECK_INTERVAL_S": "0.2",
    **ports_from(28000),
}


class Settled(NamedTuple):
    """A kill, and the seconds until all was settled again."""

    seconds: float
    case: Case


@pytest.fixture
def ahead() -> Iterator[None]:
    """What is started meanwhile goes before what the machine does besides, if the test may say so: it is timed."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.figure(KILLS)
def test_no_failpoint_is_forgotten() -> None:
    tried = {case for seed in SEEDS for case in cases(seed)}
    assert {case.point for case in tried} | ELSEWHERE == set(get_args(Point))
    assert tried == {Case(name, point) for name, operation in OPERATIONS.items() for point in operation.points}


@pytest.mark.early(150)
@pytest.mark.usefixtures("ahead")
@pytest.mark.figure(KILLS)
@pytest.mark.figure(CONVERGENCE)
@pytest.mark.figure(LOST)
async def test_a_provisioner_killed_at_any_failpoint_is_followed_by_one_that_finishes(
    seed: int, extent: Callable[[int, int], int], score: Score, postgres_url: str, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    tried = cases(seed)
    tried = chance.sample(tried, extent(6, len(tried)))
    # One that is stopped with an engine's lock keeps it: nobody else can know that it will not go on.
    stopped = chance.sample([case for case in tried if not case.point.startswith("process.")], extent(1, 6))
    settled: list[Settled] = []
    lost: Counter[str] = Counter()
    for pool in (False, True):
        here = [case for case in tried if OPERATIONS[case.operation].pool is pool]
        if not here:
            continue
        directory = tmp_path / ("pool" if pool else "cold")
        directory.mkdir()
        with running_platform(new_database(postgres_url), directory, **SETTINGS) as platform:
            crew = Crew(platform, pool=int(pool))
            try:
                await kills(crew, here, stopped, chance, settled, lost)
            finally:
                await crew.close()
    converged(score, settled)
    volumes = lost.pop("volume", 0)
    score(KILLS, f"{len(settled)} kills", True)
    score(LOST, f"{lost.total()}; {volumes}", not (lost or volumes))
    assert (lost, volumes) == (Counter(), 0)


def converged(score: Score, settled: Sequence[Settled], where: str = "") -> None:
    """Notes how long 99% of the kills took at most until all was settled again; if too long, which took longest."""
    p99_s = quantiles([kill.seconds for kill in settled], n=100, method="inclusive")[98]
    soon = p99_s <= RECONCILE_S + 5
    longest = max(settled).case
    score(CONVERGENCE, f"{p99_s:.1f} s{where}" + ("" if soon else f" ({longest.operation}, {longest.point})"), soon)


async def kills(
    crew: Crew,
    tried: Sequence[Case],
    stopped: Sequence[Case],
    chance: random.Random,
    settled: list[Settled],
    lost: Counter[str],
) -> None:
    """Tries the cases, each with a second Provisioner beside, or with a new one afterwards; two engines look on.

    Args:
        stopped: what is tried a second time, with a stop in place of the kill.
    """
    await crew.muster(1)
    product = await crew.clients()[0].register(allowed_images=["services.engine", "tests.engines.*"])
    awake, asleep = Subject(crew, product), Subject(crew, product)
    await asyncio.gather(awake.prepare("Provision"), asleep.prepare("Provision", "Sleep"))
    for case in tried:
        operation = OPERATIONS[case.operation]
        seconds, missed = await survived(crew, product, operation, case.point, both_live=chance.random() < 0.5)
        print(f"{case.operation}, {case.point}: {seconds:.1f} s {missed}")
        settled.append(Settled(seconds, case))
        lost.update(missed)
        if case in stopped:  # How long it takes is the caller's patience.
            _, missed = await survived(crew, product, operation, case.point, both_live=True, stopped=True)
            lost.update(missed)
    await crew.muster(1)
    await asleep.call("Wake")
    lost.update(await awake.lost() + await asleep.lost())
    await asyncio.gather(awake.end(), asleep.end())


async def survived(
    crew: Crew, product: Product, operation: Operation, point: Point, *, both_live: bool, stopped: bool = False
) -> tuple[float, list[str]]:
    """Kills a Provisioner at a point of the operation; seconds until all was settled again, and what was lost.

    Args:
        both_live: a second Provisioner lives already; otherwise one is started after the kill.
        stopped: it is not killed, but stopped, and goes on when the other one has finished.
    """
    await crew.muster(1 + both_live)
    await asyncio.to_thread(eventually, crew.is_at_rest, "nothing is under way", 60)
    subject = Subject(crew, product, operation.image)
    await subject.prepare(*operation.prepared)
    crew.break_at(point, "SIGSTOP" if stopped else "SIGKILL")
    if operation.happens:
        await subject.prepare(operation.happens)
    async with asyncio.TaskGroup() as group:
        if operation.call:
            group.create_task(subject.call(operation.call, operation.refusal))
        broken = await crew.broken(point)
        began = time.monotonic()
        if point.startswith("rotate."):
            assert await subject.takes_the_key_handed_out(), f"{point}: the engine rejects its user"
        await crew.muster(1 + stopped)
        await asyncio.to_thread(eventually, lambda: subject.is_settled(operation.after), f"{point} is survived", 60)
        settled_s = time.monotonic() - began
        if stopped:
            os.kill(broken.process.pid, signal.SIGCONT)

    def is_at_rest() -> bool:
        return crew.is_at_rest() and subject.is_settled(operation.after)

    await asyncio.to_thread(eventually, is_at_rest, "nothing more happens, and the pool is full", 60)
    oracle(crew.platform)
    lost = await subject.lost()
    await subject.end()
    return settled_s, lost
