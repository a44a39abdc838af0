"""The disk of engines' data short of room, or full: no engine is begun, and those that are there go on."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.chaos.load import admit
from tests.chaos.oracle import oracle
from tests.chaos.outage import CHANGED, USERS, Callers
from tests.disk import disk, filled
from tests.e2e.own_dockerd import own_dockerd
from tests.e2e.test_docker import IMAGE, images
from tests.e2e.test_docker_restart import platform_on
from tests.harness import Clients, Platform, Service, eventually, reason, retry_after_s, running_platform
from tests.integration.docker_daemon import docker_api
from tests.integration.test_life_cycle import User
from tests.scrape import metrics_ports, scrape

pytestmark = pytest.mark.early(20)

__all__ = ["docker_api", "images"]

Connect = Callable[..., Clients]
MIN_FREE_MIB = 16
PORTS = {"ORCH_PORT_MIN": "22000", "ORCH_PORT_MAX": "22499"}


class Place(NamedTuple):
    """A platform whose engines' data is on a small disk."""

    platform: Platform
    disk: Path


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        if request.param == "process":
            directory = tmp_path / "var"
            directory.mkdir()
            stack.enter_context(disk(directory, 64))
            platform = stack.enter_context(running_platform(database_url, tmp_path, **PORTS))
        else:
            request.getfixturevalue("images")
            dockerd = stack.enter_context(own_dockerd(megabytes=512))
            dockerd.load(IMAGE)
            directory = dockerd.data
            platform = stack.enter_context(platform_on(dockerd, database_url, tmp_path, **PORTS))
        yield Place(platform, directory)


async def opened(platform: Platform, provisioner: Service, connect: Connect) -> Callers:
    clients = connect(platform, provisioner, platform.admission(provisioner))
    callers = Callers(platform, clients, await clients.register(), [clients.admission])
    await callers.open()
    return callers


async def refusal(callers: Callers) -> grpc.aio.AioRpcError:
    """Of one more engine."""
    request = pb.ProvisionEngineRequest(user_id="refused")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await callers.clients.provisioner.ProvisionEngine(request, metadata=callers.product.metadata, timeout=30)
    return caught.value


async def test_short_of_room_no_engine_is_begun_and_those_that_are_there_go_on(place: Place, connect: Connect) -> None:
    platform = place.platform
    provisioner = platform.provisioner(
        ORCH_DISK_FREE_MIN_MIB=str(MIN_FREE_MIB),
        ORCH_WARM_POOL_SIZE="2",
        ORCH_PROVISIONER_METRICS_LISTEN="127.0.0.1:0",
    )
    callers = await opened(platform, provisioner, connect)
    [port] = metrics_ports(provisioner)

    def is_short() -> bool:
        return scrape(port)("september_disk_free_bytes") < scrape(port)("september_disk_free_min_bytes")

    def pool_is_full() -> bool:
        return platform.query("SELECT count(*) FROM engines WHERE product_id IS NULL AND status = 'running'") == [(2,)]

    def postponed() -> list[str]:
        """Why the pool was not filled, each time that it was said."""
        return [event["reason"] for event in provisioner.events() if event["event"] == "warm_pool_postponed"]

    async def until(condition: Callable[[], object], what: str) -> None:
        await asyncio.to_thread(eventually, condition, what)

    await until(pool_is_full, "the pool is full")
    assert not is_short()
    async with callers.load(50) as running:
        with filled(place.disk, but=MIN_FREE_MIB << 19):
            await until(is_short, "the disk is seen to be short")
            for user_id in ("claims", "claims-too"):
                claimed = await admit(callers.stubs[0], callers.product, user_id, auto_provision=True)
                assert claimed.outcome == "admitted", "what is booted already takes no more room"
                await until(postponed, "the pool is not filled")
            error = await refusal(callers)
            assert (reason(error), retry_after_s(error)) == ("UNAVAILABLE", 30)
            assert error.details() == "no disk space is left for one more engine"
            assert (await admit(callers.stubs[0], callers.product, "new", auto_provision=True)).outcome == "UNAVAILABLE"
            user = User(callers.clients, callers.product, CHANGED)
            for verb in ("Sleep", "Wake", "Stop", "Start", "Destroy"):
                await (user.sleep() if verb == "Sleep" else user.call(verb))
            oracle(platform)
            assert set(platform.query("SELECT user_id FROM engines")) == {
                (one,) for one in (*USERS, "claims", "claims-too")
            }
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}
    await until(pool_is_full, "the pool is full again")
    assert len(postponed()) == 1, "each claim tries to fill it, and it is said once"
    oracle(platform)


async def test_on_a_full_disk_an_engine_is_refused_and_nothing_of_it_is_left(place: Place, connect: Connect) -> None:
    platform = place.platform
    callers = await opened(platform, platform.provisioner(ORCH_DISK_FREE_MIN_MIB="0"), connect)
    async with callers.load(50) as running:
        with filled(place.disk):
            assert reason(await refusal(callers)) == "BACKEND_ERROR"
            oracle(platform)
            await User(callers.clients, callers.product, CHANGED).call("Destroy")
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}
    oracle(platform)
