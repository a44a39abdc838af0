"""Chaotic lives: users who ask for anything and wait for little, while the parts are killed, stopped and restarted."""

import asyncio
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.provisioner.store.migrations import names
from tests.chaos.monkey import Part, mischief, parts_of
from tests.chaos.oracle import oracle
from tests.chaos.score_card import Score
from tests.chaos.test_kills import KILLS, LOST
from tests.e2e.own_dockerd import OwnDockerd
from tests.e2e.test_docker import DockerPlatform, images
from tests.e2e.test_docker_restart import dockerd
from tests.e2e.test_docker_restart import platform as docker_platform
from tests.harness import ROOT, Clients, Platform, Product, eventually, reason
from tests.integration.docker_daemon import docker_api

__all__ = ["docker_api", "docker_platform", "dockerd", "images"]

pytestmark = pytest.mark.early(60)

LEFT = "containers, volumes, ports left over after 1,000 chaotic lives"

SETTINGS = {
    "ORCH_OPERATION_LEASE_S": "1",
    "ORCH_RECONCILE_INTERVAL_S": "2",
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_RESTART_BACKOFF_BASE_S": "0.1",
    "ORCH_SLEEP_CHECK_INTERVAL_S": "0.2",
    "ORCH_DEEP_SLEEP_AFTER_S": "1",
}
AT_ONCE = 8
CALLS: dict[str, Callable[..., Any]] = {
    "ProvisionEngine": pb.ProvisionEngineRequest,
    "StartEngine": pb.StartEngineRequest,
    "StopEngine": pb.StopEngineRequest,
    "SleepEngine": pb.SleepEngineRequest,
    "WakeEngine": pb.WakeEngineRequest,
    "RotateEngineKey": pb.RotateEngineKeyRequest,
    "DestroyEngine": pb.DestroyEngineRequest,
    "Admit": admission_pb.AdmitRequest,
}
MAKES = ("ProvisionEngine", "Admit")
# What may be lost.
GONE, KEY, VOLUME = "destroyed, and there", "another key", "volume"
KEYED = ("ProvisionEngine", "RotateEngineKey", "DestroyEngine")
TRIES = 5
# After these it may happen yet.
_UNDECIDED = (None, "UNAVAILABLE", "BOOT_TIMEOUT")


class Life:
    """One user: what they ask for, and what they may rely on since they were told.

    Args:
        platform: theirs.
        everybody: stubs of every Provisioner, each with one of an Admission.
        product: theirs.
        user_id: theirs.
        seed: of all that they do.
        looks: where it is counted how often what they were told was held against what is.
        lost: where it is counted what is not so.
    """

    def __init__(
        self,
        platform: Platform,
        everybody: Sequence[Clients],
        product: Product,
        user_id: str,
        seed: int,
        looks: Counter[str],
        lost: Counter[str],
    ) -> None:
        self._platform = platform
        self._everybody = everybody
        self._product = product
        self._user_id = user_id
        self._chance = random.Random(seed)
        self._looks = looks
        self._lost = lost
        # The key and the data that are certain, and whether it is certain that there is no engine.
        self._key: str | None = None
        self._marker: Path | None = None
        self._is_gone = True
        # A call that nobody waited for to the end may be carried out any time later.
        self._in_doubt = False

    async def live(self) -> None:
        for _ in range(self._chance.randint(2, 6)):
            await self._call(self._chance.choice(["ProvisionEngine", *CALLS]))
            await self._look()
        await self.end()

    async def end(self) -> None:
        """Destroys whatever there is."""
        async with asyncio.timeout(120):
            while True:
                try:
                    await self._made("DestroyEngine", 20)
                except grpc.aio.AioRpcError as error:
                    if _code(error) == "ENGINE_NOT_FOUND":
                        return

    async def _call(self, name: str) -> None:
        """Makes a call, and notes what is certain after it."""
        answer, refused = await self._asked(name)
        if answer is None:
            if not refused and name in (*MAKES, "RotateEngineKey", "DestroyEngine"):
                self._in_doubt, self._key, self._marker, self._is_gone = True, None, None, False
            return
        if name == "DestroyEngine":
            self._key, self._marker, self._is_gone = None, None, not self._in_doubt
        elif name in ("ProvisionEngine", "RotateEngineKey"):
            self._key, self._is_gone = None if self._in_doubt else answer.api_key, False
        elif name == "Admit" and answer.admitted:
            self._is_gone = False
        if name == "ProvisionEngine" and not self._in_doubt:
            self._marker = await asyncio.to_thread(self._platform.volume, UUID(answer.engine_id)) / "marker"
            self._marker.touch()

    async def _asked(self, name: str) -> tuple[Any, bool]:
        """The answer, or None and whether the call was refused; otherwise it may have happened or not, or happen yet.

        The caller may go away for good, or come again with the same idempotency key: once that is answered, what was
        not waited for is done, and not done again.
        """
        key = ("idempotency-key", uuid4().hex)
        tries = TRIES if name in KEYED and self._chance.random() < 0.8 else 1
        for tried in range(tries):
            call = self._made(name, self._chance.choice([0.05, 0.5, 5, 30]), key)
            patience_s = self._chance.uniform(0, 0.5) if self._chance.random() < 0.2 else None
            try:
                async with asyncio.timeout(patience_s):
                    return await call, False
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if isinstance(error, grpc.aio.AioRpcError) and _code(error) not in _UNDECIDED:
                    # One before it may yet find what this one did not.
                    return None, not tried
        return None, False

    def _made(self, name: str, timeout_s: float, *metadata: tuple[str, str]) -> Any:
        clients = self._chance.choice(self._everybody)
        stub = clients.admission if name == "Admit" else clients.provisioner
        fields = {"auto_provision": True, "auto_wake": True} if name == "Admit" else {}
        request = CALLS[name](user_id=self._user_id, **fields)
        return getattr(stub, name)(request, metadata=(*self._product.metadata, *metadata), timeout=timeout_s)

    async def _look(self) -> None:
        """Whether all that is certain is so, as soon as anybody answers."""
        if not (self._is_gone or self._key or self._marker):
            return
        answer = await self._found()
        if self._is_gone:
            self._note(GONE, not answer.denial)
        if self._key is not None and answer.engine.api_key:
            self._note(KEY, answer.engine.api_key != self._key)
        if self._marker is not None:
            self._note(VOLUME, not self._marker.exists())

    def _note(self, loss: str, is_so: bool) -> None:
        self._looks[loss] += 1
        self._lost[loss] += is_so

    async def _found(self) -> pb.EnsureEngineResponse:
        request = pb.EnsureEngineRequest(user_id=self._user_id)
        async with asyncio.timeout(60):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    clients = self._chance.choice(self._everybody)
                    return await clients.provisioner.EnsureEngine(request, metadata=self._product.metadata, timeout=5)
                await asyncio.sleep(0.05)


def _code(error: grpc.aio.AioRpcError) -> str | None:
    """The error's code; None if it was not the platform that answered."""
    with suppress(AssertionError):
        return reason(error)
    return None


async def live(platform: Platform, parts: list[Part], lives: int, seed: int, *others: Callable[[], None]) -> str:
    """Lives so many lives among the parts; returns what was lost of how much, once nothing is left of them."""
    chance = random.Random(seed)
    provisioners, admission = [part.service.address for part in parts[:-1]], parts[-1].service.address
    everybody = [Clients(platform, address, admission) for address in provisioners]
    product = await everybody[0].register(max_engines=100)
    looks: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    waiting = [Life(platform, everybody, product, f"u{i}", chance.randrange(2**32), looks, lost) for i in range(lives)]
    turns = asyncio.Semaphore(AT_ONCE)

    async def take_turn(life: Life) -> None:
        async with turns:
            await life.live()

    async with mischief(parts, chance, *others) as done:
        await asyncio.gather(*(take_turn(life) for life in waiting))
    # What nobody waited for may have been begun after its user's last look.
    while left := platform.query("SELECT user_id FROM engines"):
        for (user_id,) in left:
            await Life(platform, everybody, product, user_id, seed, looks, lost).end()
        await asyncio.to_thread(eventually, lambda: platform.open_operations() == 0, "every operation has ended")
    for clients in everybody:
        await clients.close()
    print(f"{lives} lives, {dict(Counter(done))}, looks {dict(looks)}")
    assert not +lost
    assert min(looks[GONE], looks[KEY], looks[VOLUME]) > lives // 10
    return f"{lost[GONE] + lost[KEY]} of {looks[GONE] + looks[KEY]}; {lost[VOLUME]} of {looks[VOLUME]}"


def nothing_is_left(platform: Platform, score: Score, lives: int) -> None:
    oracle(platform)
    counts = platform.counts()
    [kind] = counts.keys() & {"containers", "processes"}
    left = [counts[kind], counts["volumes"], counts["ports"]]
    value = f"{', '.join(map(str, left))} of {lives} in {kind}"
    score(LEFT, value, left == [0, 0, 0])
    assert left == [0, 0, 0], counts


@pytest.mark.figure(LEFT)
@pytest.mark.figure(LOST)
async def test_of_chaotic_lives_nothing_is_left(
    platform: Platform, seed: int, extent: Callable[[int, int], int], score: Score
) -> None:
    platform.environment |= SETTINGS
    lives = extent(40, 340)
    lost = await live(platform, parts_of(platform), lives, seed)
    nothing_is_left(platform, score, lives)
    score(LOST, lost, True)


@pytest.fixture
def version_before(tmp_path: Path) -> dict[str, str]:
    """What makes of a part what it was before the newest migration."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False).stdout

    migrations = "services/provisioner/sql/migrations"
    newest = git("log", "--diff-filter=A", "--max-count=1", "--format=%H", "--", migrations).decode().strip()
    archive = git("archive", f"{newest}^", "services", "gen/python")
    if not archive:
        pytest.skip("there is no history here")
    there = tmp_path / "before"
    there.mkdir()
    subprocess.run(["tar", "--extract", "--directory", there], input=archive, check=True)
    # Or the working directory would come first.
    return {"PYTHONPATH": f"{there}:{there / 'gen' / 'python'}", "PYTHONSAFEPATH": "1"}


async def test_of_lives_among_parts_of_this_version_and_the_one_before_nothing_is_left(
    platform: Platform, version_before: dict[str, str], extent: Callable[[int, int], int]
) -> None:
    platform.environment |= SETTINGS
    parts = parts_of(platform, version_before, {})
    before, now = (
        [event["name"] for event in part.service.events() if event["event"] == "migration_applied"]
        for part in parts[:2]
    )
    assert [*before, *now] == names()
    assert before
    assert now
    await live(platform, parts, extent(40, 100), seed=1)
    oracle(platform)


@pytest.mark.long
@pytest.mark.figure(LEFT)
@pytest.mark.figure(KILLS)
async def test_of_chaotic_lives_in_containers_nothing_is_left_though_dockerd_is_killed_too(
    docker_platform: DockerPlatform, dockerd: OwnDockerd, seed: int, extent: Callable[[int, int], int], score: Score
) -> None:
    def kill_dockerd() -> None:
        dockerd.kill()
        dockerd.start()

    docker_platform.environment |= SETTINGS
    assert docker_platform.volumes.is_dir()  # Asked for before the daemon is killed.
    parts = parts_of(docker_platform)
    lives = extent(8, 24)
    await live(docker_platform, parts, lives, seed, kill_dockerd, kill_dockerd)
    nothing_is_left(docker_platform, score, lives)
    score(KILLS, "dockerd and each process under calls", True)
