"""What Docker loses, the platform brings back: a daemon killed under engines in every state."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from docker import APIClient

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import engine_pb2
from tests.e2e.own_dockerd import OwnDockerd, own_dockerd
from tests.e2e.test_docker import IMAGE, DockerPlatform, images
from tests.harness import Clients, Product, eventually
from tests.integration.docker_daemon import docker_api
from tests.integration.test_life_cycle import User, accepted, execute

pytestmark = pytest.mark.early(20)

__all__ = ["docker_api", "images"]

Connect = Callable[..., Clients]
STATUS = engine_pb2.Engine.Status
INTERVAL_S = 5
MARGIN_S = 5
SETTINGS = {
    "ORCH_PORT_MIN": "27000",
    "ORCH_PORT_MAX": "27999",
    "ORCH_RECONCILE_INTERVAL_S": str(INTERVAL_S),
}


@pytest.fixture
def dockerd(docker_api: APIClient, images: None) -> Iterator[OwnDockerd]:
    with own_dockerd() as dockerd:
        dockerd.load(IMAGE)
        yield dockerd


@contextmanager
def platform_on(dockerd: OwnDockerd, database_url: str, directory: Path, **settings: str) -> Iterator[DockerPlatform]:
    """An installation whose engines are this daemon's containers."""
    platform = DockerPlatform(
        database_url,
        directory,
        DOCKER_HOST=dockerd.address,
        ORCH_ENGINE_BACKEND="docker",
        ORCH_ENGINE_IMAGE=IMAGE,
        ORCH_ENGINE_NETWORK=dockerd.network,
        **settings,
    )
    platform.api = dockerd.client()
    try:
        yield platform
    finally:
        platform.close()
        platform.api.close()


@pytest.fixture
def platform(database_url: str, tmp_path: Path, dockerd: OwnDockerd) -> Iterator[DockerPlatform]:
    with platform_on(
        dockerd, database_url, tmp_path, **SETTINGS, ORCH_HEALTH_CHECK_INTERVAL_S="1", ORCH_RESTART_BACKOFF_BASE_S="0.1"
    ) as platform:
        yield platform


@dataclass
class Fleet:
    """Engines of one product, in all states."""

    platform: DockerPlatform
    clients: Clients
    product: Product
    made: dict[str, Any]

    def user(self, user_id: str) -> User:
        return User(self.clients, self.product, user_id)

    async def provision(self, *user_ids: str) -> None:
        async def provision(user_id: str) -> None:
            self.made[user_id] = made = await self.user(user_id).call("Provision")
            await execute(made.url, made.api_key, "hello")

        await asyncio.gather(*(provision(user_id) for user_id in user_ids))

    async def each(self, verb: str, user_ids: Iterable[str]) -> None:
        users = [self.user(user_id) for user_id in user_ids]
        await asyncio.gather(*(user.sleep() if verb == "Sleep" else user.call(verb) for user in users))

    async def remembers(self, user_id: str, url: str) -> bool:
        """Whether the user's engine, and no other, answers at this URL, with all that it was told."""
        done = (await execute(url, self.made[user_id].api_key, "again"))[-1]
        others = [made.api_key for other, made in self.made.items() if other != user_id]
        return done["messages"] == 4 and not any([await accepted(url, key) for key in others])

    @asynccontextmanager
    async def guarded(self, user_id: str) -> AsyncIterator[None]:
        """Within the block the user's key is tried at every leased port, over and over: it opens their engine alone."""
        made, opened = self.made[user_id], set[str]()

        async def opens(session: aiohttp.ClientSession, port: int) -> bool:
            turn = {"message": "hello", "conversation_id": "guard"}
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(f"http://127.0.0.1:{port}/execute", json=turn) as answer:
                    return answer.status == 200
            return False

        async def knock() -> None:
            patience = aiohttp.ClientTimeout(total=0.5)
            async with aiohttp.ClientSession(headers={"X-Engine-Key": made.api_key}, timeout=patience) as session:
                while True:
                    leases = await asyncio.to_thread(self.platform.query, "SELECT engine_id, port FROM port_leases")
                    answers = await asyncio.gather(*(opens(session, port) for _, port in leases))
                    opened.update(str(lease[0]) for lease, answer in zip(leases, answers, strict=True) if answer)

        knocking = asyncio.create_task(knock())
        try:
            yield
            await self.until(lambda: opened or knocking.done(), "the user's engine is found")
        finally:
            knocking.cancel()
            await asyncio.wait([knocking])
        assert knocking.cancelled()
        assert opened == {made.engine_id}

    def rows(self) -> dict[str, tuple[str, bool]]:
        rows = self.platform.query("SELECT user_id, status, deep_asleep FROM engines")
        return {user_id: (status, deep_asleep) for user_id, status, deep_asleep in rows}

    def states(self) -> dict[str, str]:
        """What Docker says of each user's container."""
        containers = self.platform.api.containers(all=True, filters=self.platform.filters())
        states = {container["Labels"]["september.engine_id"]: container["State"] for container in containers}
        return {user_id: states[made.engine_id] for user_id, made in self.made.items()}

    def volumes(self) -> set[str]:
        return {volume["Name"] for volume in self.platform.api.volumes(filters=self.platform.filters())["Volumes"]}

    def spoil(self, user_id: str) -> None:
        """Kills the user's engine, and keeps it from its data, so that it never comes back."""
        engine_id = self.made[user_id].engine_id
        Path(self.platform.api.inspect_volume(f"engine-data-{engine_id}")["Mountpoint"]).chmod(0)
        self.platform.api.kill(f"engine-{engine_id}")

    async def until(self, condition: Callable[[], object], what: str, deadline_s: float = 60) -> None:
        await asyncio.to_thread(eventually, condition, what, deadline_s)


async def test_a_killed_daemon_and_engines_in_all_states(
    platform: DockerPlatform, dockerd: OwnDockerd, connect: Connect
) -> None:
    running, frozen, deep, stopped = (
        [f"{state}{i}" for i in range(count)]
        for state, count in (("running", 6), ("frozen", 5), ("deep", 4), ("stopped", 4))
    )
    first = platform.provisioner(
        ORCH_SLEEP_CHECK_INTERVAL_S="0.2", ORCH_DEEP_SLEEP_AFTER_S="1", ORCH_RESTART_MAX_ATTEMPTS="1"
    )
    clients = connect(platform, first, platform.admission(first))
    fleet = Fleet(platform, clients, await clients.register(), {})
    await fleet.provision(*deep, *stopped, "failed")
    await fleet.each("Sleep", deep)
    await fleet.each("Stop", stopped)
    fleet.spoil("failed")
    given_up = "SELECT 1 FROM engines WHERE status = 'failed' AND restart_at IS NULL"
    await fleet.until(lambda: platform.query(given_up), "one is given up")
    await fleet.until(lambda: all(fleet.rows()[user_id] == ("sleeping", True) for user_id in deep), "some sleep deeply")
    assert first.terminate() == 0

    # From here on nobody but the reconciler looks.
    second = platform.provisioner(ORCH_HEALTH_CHECK_INTERVAL_S="3600")
    fleet.clients = connect(platform, second, platform.admission(second))
    await fleet.provision(*running, *frozen)
    await fleet.each("Sleep", frozen)
    states, volumes = fleet.states(), fleet.volumes()
    assert {states[user_id] for user_id in running} == {"running"}
    assert {states[user_id] for user_id in frozen} == {"paused"}
    assert len(volumes) == 20

    async with fleet.guarded(running[0]):
        await asyncio.to_thread(dockerd.kill)
        await asyncio.to_thread(dockerd.start)
        await back(fleet, running, frozen, deep, stopped, volumes)


async def back(
    fleet: Fleet, running: list[str], frozen: list[str], deep: list[str], stopped: list[str], volumes: set[str]
) -> None:
    """Waits until all is as it was, or may be."""
    assert set(fleet.states().values()) == {"exited"}

    def rows_are_true() -> bool:
        """What a row says is so, or an operation is there to make it so."""
        rows, states = fleet.rows(), fleet.states()
        return all(
            rows[user_id][0] == "provisioning" or (rows[user_id], states[user_id]) == (("running", False), "running")
            for user_id in running
        ) and all(rows[user_id] == ("sleeping", True) for user_id in frozen)

    await fleet.until(rows_are_true, "the rows are true", INTERVAL_S + MARGIN_S)
    await fleet.until(lambda: all(fleet.rows()[user_id] == ("running", False) for user_id in running), "all are back")
    expected = {
        **dict.fromkeys(running, ("running", False)),
        **dict.fromkeys([*frozen, *deep], ("sleeping", True)),
        **dict.fromkeys(stopped, ("stopped", False)),
        "failed": ("failed", False),
    }
    assert fleet.rows() == expected
    assert {user_id for user_id, state in fleet.states().items() if state == "running"} == set(running)
    assert fleet.volumes() == volumes

    for user_id in running:
        request = admission_pb.GetEngineRequest(user_id=user_id)
        engine = (await fleet.clients.admission.GetEngine(request, metadata=fleet.product.metadata)).engine
        assert (engine.engine_id, engine.api_key) == (fleet.made[user_id].engine_id, fleet.made[user_id].api_key)
        assert await fleet.remembers(user_id, engine.url)
    for user_id in (*frozen, *deep):
        assert await fleet.remembers(user_id, (await fleet.user(user_id).admit(auto_wake=True)).engine.url)
    for user_id in stopped:
        assert await fleet.remembers(user_id, (await fleet.user(user_id).call("Start")).url)
    assert set(fleet.platform.counts().values()) == {20}


@pytest.mark.long
async def test_with_live_restore_a_killed_daemon_ends_no_engine(
    docker_api: APIClient, images: None, database_url: str, tmp_path: Path, connect: Connect
) -> None:
    with own_dockerd(live_restore=True) as dockerd:
        dockerd.load(IMAGE)
        with platform_on(dockerd, database_url, tmp_path, **SETTINGS, ORCH_HEALTH_CHECK_INTERVAL_S="3600") as platform:
            first = platform.provisioner()
            clients = connect(platform, first, platform.admission(first))
            fleet = Fleet(platform, clients, await clients.register(), {})
            await fleet.provision("running", "frozen")
            await fleet.each("Sleep", ["frozen"])

            def lives() -> list[tuple[int, str]]:
                shown = [platform.api.inspect_container(f"engine-{made.engine_id}") for made in fleet.made.values()]
                return [(one["State"]["Pid"], one["State"]["StartedAt"]) for one in shown]

            before = lives()
            async with fleet.guarded("running"):
                await asyncio.to_thread(dockerd.kill)
                await asyncio.to_thread(dockerd.start)
                assert lives() == before
                # It looks at everything before it serves.
                second = await asyncio.to_thread(platform.provisioner)
                fleet.clients = connect(platform, second, platform.admission(second))
                for user_id in fleet.made:
                    engine = (await fleet.user(user_id).admit(auto_wake=True)).engine
                    assert await fleet.remembers(user_id, engine.url)
            assert lives() == before
            assert platform.query("SELECT kind FROM operations WHERE kind NOT IN ('provision', 'sleep', 'wake')") == []
            assert set(platform.counts().values()) == {2}


async def test_a_container_that_died_unseen_is_made_anew(
    platform: DockerPlatform, dockerd: OwnDockerd, connect: Connect
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    fleet = Fleet(platform, clients, await clients.register(), {})
    await fleet.provision("u1")
    made = fleet.made["u1"]
    dockerd.lose(f"engine-{made.engine_id}")
    await fleet.until(
        lambda: platform.query("SELECT 1 FROM audit_events WHERE action = 'auto_restart_success'"), "it is back", 150
    )
    # Docker never said that it had ended: only its silence did.
    assert platform.query("SELECT detail FROM audit_events WHERE action = 'health_failed'") == [
        ("it has failed 3 probes in a row",)
    ]
    engine = (await fleet.user("u1").admit()).engine
    assert (engine.engine_id, engine.api_key) == (made.engine_id, made.api_key)
    assert await fleet.remembers("u1", engine.url)
    assert platform.query("SELECT restart_attempts FROM engines WHERE engine_id = %s", UUID(made.engine_id)) == [(1,)]
