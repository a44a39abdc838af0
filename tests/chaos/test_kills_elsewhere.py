"""SIGKILL outside of operations, of what answers calls, and of operations on containers."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import grpc
import pytest
from docker import APIClient
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from services.shared.failpoints import VARIABLE, Point
from tests.chaos.crew import Crew
from tests.chaos.monkey import Part
from tests.chaos.operations import OPERATIONS, Case, cases
from tests.chaos.score_card import Score
from tests.chaos.test_kills import CONVERGENCE, KILLS, RECONCILE_S, Settled, ahead, converged, survived
from tests.e2e.gateway_process import Inside, running_gateway
from tests.e2e.test_docker import IMAGE, DockerPlatform, images
from tests.e2e.test_docker import platform as docker_platform
from tests.e2e.test_lane import REAL
from tests.harness import Clients, Platform, Product, running_platform
from tests.integration.docker_daemon import docker_api
from tests.integration.test_life_cycle import User
from tests.integration.test_master_key import NEW, OLD, Rows, rows

__all__ = ["ahead", "docker_api", "docker_platform", "images", "rows"]

pytestmark = pytest.mark.figure(KILLS)

Connect = Callable[..., Clients]
ON_CONTAINERS = {"provision", "start", "sleep", "wake", "stop", "rotate", "rotate without the endpoint", "destroy"}
DOCKER_CASES = (
    Case("rotate without the endpoint", "docker.outdated_removed"),
    Case("destroy", "docker.container_removed"),
)
NO_ROTATION = f"september-test-no-rotation-{uuid4().hex[:12]}:dev"
_WITHOUT_THE_ENDPOINT = """
import sys
from services.engine.__main__ import main
from services.engine.errors import RouteNotFound
from services.engine.handler import Handler
def no_such_route(self, body):
    raise RouteNotFound
Handler._rotate_key = no_such_route
sys.exit(main())
"""


def september(links: Path, *command: str, **environment: str) -> int:
    """Runs a command with failpoints; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *command],
        env={"PATH": os.environ["PATH"], VARIABLE: str(links), **environment},
        capture_output=True,
        check=False,
    ).returncode


@pytest.mark.parametrize("point", ["migration.applied", "migration.committed"])
def test_a_migration_that_was_killed_goes_on_where_it_was(database_url: str, tmp_path: Path, point: Point) -> None:
    environment = {"ORCH_DATABASE_URL": database_url, "ORCH_VAR_DIR": str(tmp_path / "var")}
    links = tmp_path / "failpoints"
    links.mkdir()
    for _ in range(2):
        (links / point).symlink_to("SIGKILL")
        assert september(links, "db", "migrate", **environment) == -signal.SIGKILL
    assert september(links, "db", "migrate", **environment) == 0
    with running_platform(database_url, tmp_path) as platform:
        platform.provisioner()


def test_a_change_of_the_master_key_that_was_killed_goes_on_where_it_was(rows: Rows, tmp_path: Path) -> None:
    rows.add(1_200)
    environment = {"ORCH_DATABASE_URL": rows.url, "ORCH_MASTER_KEY": f"{NEW},{OLD}"}
    for _ in range(2):
        (tmp_path / "rekey.replaced").symlink_to("SIGKILL")
        assert september(tmp_path, "keys", "rotate", **environment) == -signal.SIGKILL
    assert september(tmp_path, "keys", "rotate", **environment) == 0
    rows.check()


async def test_a_registration_that_was_killed_is_made_once(platform: Platform) -> None:
    crew = Crew(platform)
    await crew.muster(2)
    slug, key = f"p{uuid4().hex[:20]}", uuid4().hex

    def register(clients: Clients) -> Any:
        metadata = (*clients.admin, ("idempotency-key", key))
        request = product_pb.RegisterProductRequest(slug=slug, policy=ParseDict({"max_engines": 1}, Struct()))
        return clients.products.RegisterProduct(request, metadata=metadata)

    crew.break_at("key.claimed")
    call = asyncio.create_task(crew.told(register))
    await crew.broken("key.claimed")
    answer = await call
    assert (await crew.told(register)).platform_api_key == answer.platform_api_key
    assert platform.query("SELECT count(*) FROM products WHERE slug = %s", slug) == [(1,)]
    await crew.close()


async def admitted_throughout(admit: Callable[[], Any], unreachable: Callable[[Exception], bool], kills: Any) -> None:
    """Calls from many sides while `kills` goes on: what is answered is right, and what is not may be asked again."""
    over = asyncio.Event()

    async def call() -> int:
        answers = 0
        while not over.is_set() or not answers:
            try:
                await admit()
            except Exception as error:
                if not unreachable(error):
                    raise
                await asyncio.sleep(0.02)
            else:
                answers += 1
        return answers

    callers = [asyncio.create_task(call()) for _ in range(8)]
    await kills
    over.set()
    async with asyncio.timeout(30):
        assert all(await asyncio.gather(*callers))


async def test_an_admission_that_is_killed_under_calls_answers_nothing_wrong(
    platform: Platform, connect: Connect
) -> None:
    provisioner = platform.provisioner()

    part = Part(lambda **settings: platform.admission(provisioner, **settings), "ORCH_ADMISSION_LISTEN")
    clients = connect(platform, provisioner, part.service)
    product = await clients.register()
    made = await User(clients, product).call("Provision")

    async def admit(*, patient: bool = False) -> None:
        request = admission_pb.AdmitRequest(user_id="u1")
        answer = await clients.admission.Admit(request, metadata=product.metadata, timeout=5, wait_for_ready=patient)
        assert (answer.engine.engine_id, answer.engine.api_key) == (made.engine_id, made.api_key)

    async def kills() -> None:
        for _ in range(3):
            # It is there for so many answers, and for those of all the others meanwhile.
            for _ in range(100):
                await admit(patient=True)
            await part.kill()

    def unreachable(error: Exception) -> bool:
        codes = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        return isinstance(error, grpc.aio.AioRpcError) and error.code() in codes

    await admitted_throughout(admit, unreachable, kills())


async def test_a_gateway_that_is_killed_under_calls_answers_nothing_wrong(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner)
    product = await clients.register()
    made = await User(clients, product).call("Provision")
    address = "127.0.0.1:1"  # Where nobody is.

    async with aiohttp.ClientSession(headers={"x-platform-key": product.key}) as session:

        async def admit() -> None:
            async with session.post(f"http://{address}/engines/u1/admit", json={}) as answer:
                assert answer.status == 200, await answer.text()
                engine = (await answer.json())["engine"]
                assert (engine["engine_id"], engine["api_key"]) == (made.engine_id, made.api_key)

        async def kills() -> None:
            nonlocal address
            inside = Inside(REAL, {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address})
            for i in range(2):
                directory = tmp_path / f"gateway{i}"
                directory.mkdir()
                async with AsyncExitStack() as stack:
                    gateway = await stack.enter_async_context(running_gateway(directory, inside, provisioner.address))
                    address = gateway.address
                    # So many that all others have had an answer, too: of the last one nobody has one afterwards.
                    for _ in range(20):
                        await admit()
                    gateway.process.kill()

        def unreachable(error: Exception) -> bool:
            return isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)

        await admitted_throughout(admit, unreachable, kills())


@pytest.fixture(scope="module")
def no_rotation(images: None, docker_api: APIClient) -> Iterator[None]:
    """The image of an engine without the endpoint for new keys."""
    command = json.dumps(["python3", "-c", _WITHOUT_THE_ENDPOINT])
    dockerfile = f"FROM {IMAGE}\nENTRYPOINT []\nCMD {command}\n"
    subprocess.run(
        ["docker", "build", "-t", NO_ROTATION, "-"], input=dockerfile.encode(), check=True, capture_output=True
    )
    yield
    docker_api.remove_image(NO_ROTATION, force=True)


@pytest.mark.long
@pytest.mark.early(90)
@pytest.mark.figure(CONVERGENCE)
@pytest.mark.usefixtures("no_rotation", "ahead")
async def test_a_provisioner_of_containers_killed_at_a_failpoint_is_followed_by_one_that_finishes(
    docker_platform: DockerPlatform, seed: int, score: Score
) -> None:
    chance = random.Random(seed)
    docker_platform.environment |= {"ORCH_RECONCILE_INTERVAL_S": str(RECONCILE_S), "ORCH_SLEEP_CHECK_INTERVAL_S": "0.2"}
    crew = Crew(docker_platform)
    await crew.muster(1)
    product: Product = await crew.clients()[0].register(allowed_images=[IMAGE, NO_ROTATION])
    tried = [case for case in cases(seed) if case.operation in ON_CONTAINERS and not case.point.startswith("process.")]
    settled = []
    for case in (*tried, *DOCKER_CASES):
        operation = OPERATIONS[case.operation]
        image = NO_ROTATION if operation.image else ""
        both_live = chance.random() < 0.5
        took_s, lost = await survived(crew, product, replace(operation, image=image), case.point, both_live=both_live)
        print(f"{case.operation}, {case.point}: {took_s:.1f} s")
        settled.append(Settled(took_s, case))
        assert not lost, case
    await crew.close()
    converged(score, settled, " in containers")
