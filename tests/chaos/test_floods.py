"""Floods of wrong keys: what they get, and what everybody else notices of them."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from time import perf_counter
from typing import NamedTuple

import aiohttp
import grpc
import psutil
import pytest

from september.admission.v1.admission_service_pb2 import AdmitRequest, CheckHealthRequest
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.provisioner.v1.provisioner_service_pb2 import ProvisionEngineRequest
from services.cli.gateway import Lane
from services.shared.keys import new_platform_key
from tests.e2e.gateway_process import DEADLINE_S, Gateway, Inside, eventually, running_gateway
from tests.harness import ROOT, Clients, Platform, Product

# Calls that pile up take more in the end; where processors run short some always do.
MOST_MEMORY = 512 * 2**20
WRONG_KEYS_PER_S = 1000
# Where others take the processors one may do more harm than it can, but not most of them.
MOST_FLOODS = 6
CONNECTIONS = 50


class Flood(NamedTuple):
    """What came of one.

    Args:
        calm_s, flooded_s: p99 of calls with a good key before it and while it was.
        not_at_once: share of those that were refused first.
        sent_per_s: wrong keys.
        refused: share of these.
    """

    calm_s: float
    flooded_s: float
    not_at_once: float
    sent_per_s: float
    refused: float

    def is_hardly_noticed(self) -> bool:
        return self.flooded_s < max(10 * self.calm_s, 0.5) and self.not_at_once < 0.02 and self.refused > 0.5


def usual(floods: list[Flood]) -> Flood:
    return Flood(*map(median_low, zip(*floods, strict=True)))


@dataclass(frozen=True)
class Scene:
    """Args:
    product: whose key all know.
    other: whose key nobody has seen yet.
    processes: by number, what takes part.
    """

    gateway: Gateway
    product: Product
    other: Product
    processes: list[int]

    @asynccontextmanager
    async def flood(self, of: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Wrong keys from this address."""
        flooder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.flooder", self.gateway.address, str(WRONG_KEYS_PER_S), of),
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield flooder
        finally:
            with suppress(ProcessLookupError):
                flooder.kill()
            await flooder.wait()

    async def admits(self, calls: int, session: aiohttp.ClientSession) -> tuple[float, float]:
        """Calls with a good key, 200 a second, all admitted; where no processor is idle, not at once.

        Returns: their p99 in seconds, and the share of those that were not admitted at once.
        """
        refused = set()

        async def call(number: int) -> float:
            began = perf_counter()
            headers = {"x-platform-key": self.product.key}
            while perf_counter() < began + DEADLINE_S:
                async with session.post(f"http://{self.gateway.address}/engines/ada/admit", headers=headers) as answer:
                    if answer.status != 503:
                        assert answer.status == 200, await answer.text()
                        assert (await answer.json())["admitted"]
                        return perf_counter() - began
                    refused.add(number)
            raise TimeoutError

        began, under_way = perf_counter(), []
        for number in range(calls):
            await asyncio.sleep(max(began + number / 200 - perf_counter(), 0))
            under_way.append(asyncio.create_task(call(number)))
        return sorted(await asyncio.gather(*under_way))[calls * 99 // 100], len(refused) / calls

    async def limits(self, session: aiohttp.ClientSession) -> bool:
        """Whether a wrong key is refused as one of too many."""
        url, headers = f"http://{self.gateway.address}/engines/ada/admit", {"x-platform-key": "wrong"}
        async with session.post(url, headers=headers) as answer:
            return answer.status == 429 and answer.headers["retry-after"] == "1"

    def memory(self) -> int:
        """Bytes of the process that has most."""
        return max(psutil.Process(process).memory_info().rss for process in self.processes)


@pytest.fixture(params=Lane)
async def scene(
    request: pytest.FixtureRequest, platform: Platform, connect: Callable[..., Clients], tmp_path: Path
) -> AsyncIterator[Scene]:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner)
    product, other = await clients.register(), await clients.register()
    await clients.provisioner.ProvisionEngine(ProvisionEngineRequest(user_id="ada"), metadata=product.metadata)
    placed: str | Inside
    processes = []
    if request.param is Lane.GRPC:
        admission = platform.admission(provisioner)
        placed, processes = admission.address, [admission.process.pid]
    else:
        environment = {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
        placed = Inside("services.admission.lane:app", environment)
    async with running_gateway(tmp_path, placed, provisioner.address) as gateway:
        yield Scene(gateway, product, other, [*processes, gateway.process.pid])


async def test_who_floods_with_wrong_keys_is_refused_and_others_of_the_same_address_are_not(
    scene: Scene, extent: Callable[[int, int], int]
) -> None:
    least, calls = extent(1, 3), extent(200, 1000)
    floods: list[Flood] = []
    while len(floods) < least or (not usual(floods).is_hardly_noticed() and len(floods) < MOST_FLOODS):
        # Of which nothing is known yet.
        address = f"127.0.0.{2 + len(floods)}"
        # Only on these connections, each of which is in one of the gateway's threads that have seen the key.
        connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=CONNECTIONS, keepalive_timeout=3600)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(scene.admits(1, session) for _ in range(CONNECTIONS)))
            await scene.admits(100, session)
            calm_s, _ = await scene.admits(calls, session)
            async with scene.flood(address) as flood:
                await eventually(partial(scene.limits, session))
                flooded_s, not_at_once = await scene.admits(calls, session)
                output, _ = await flood.communicate(b"")
        report = json.loads(output)
        answers = report["answers"]
        # Where no processor is idle some get no answer in time.
        assert set(answers) - {"UNAVAILABLE"} == {"INVALID_PLATFORM_KEY", "RATE_LIMITED"}
        assert answers["INVALID_PLATFORM_KEY"] <= 1000 + 100 * report["seconds"]
        assert scene.memory() < MOST_MEMORY
        sent_per_s = report["sent"] / report["seconds"]
        assert sent_per_s > WRONG_KEYS_PER_S / 2
        refused = (answers["INVALID_PLATFORM_KEY"] + answers["RATE_LIMITED"]) / report["sent"]
        floods.append(Flood(calm_s, flooded_s, not_at_once, sent_per_s, refused))
    of = usual(floods)
    print(
        f"p99 {of.calm_s * 1e3:.1f} ms, with {of.sent_per_s:.0f} wrong keys a second, of which"
        f" {of.refused:.0%} were refused, {of.flooded_s * 1e3:.1f} ms; {len(floods)} floods"
    )
    assert of.is_hardly_noticed(), floods


async def test_of_a_flood_the_gateway_passes_little_on_and_good_keys_get_in(scene: Scene) -> None:
    # All is on one connection, and so in one of the gateway's threads, each of which knows what it has seen itself.
    async with grpc.aio.insecure_channel(scene.gateway.address) as channel:
        stub = AdmissionServiceStub(channel)

        async def refusal(key: str) -> tuple[grpc.StatusCode, bool] | None:
            """The status, and whether it is a service's; None if the user goes in."""
            try:
                await stub.Admit(AdmitRequest(user_id="ada"), metadata=[("x-platform-key", key)])
            except grpc.aio.AioRpcError as error:
                return error.code(), "grpc-status-details-bin" in (error.trailing_metadata() or ())
            return None

        async def flood(calls: int) -> Counter[tuple[grpc.StatusCode, bool] | None]:
            return Counter(await asyncio.gather(*(refusal(new_platform_key()) for _ in range(calls))))

        assert await refusal(scene.product.key) is None
        by_service, by_gateway = ((grpc.StatusCode.RESOURCE_EXHAUSTED, detailed) for detailed in (True, False))

        async def refused() -> bool:
            return (await flood(500))[by_service] > 0

        await eventually(refused)
        began = perf_counter()
        answers = await flood(1000)
        assert set(answers) <= {(grpc.StatusCode.UNAUTHENTICATED, True), by_service, by_gateway}
        assert answers.total() - answers[by_gateway] <= 100 * (2 + perf_counter() - began)
        assert await refusal(scene.product.key) is None
        await stub.CheckHealth(CheckHealthRequest())

        async def in_in_the_end() -> bool:
            refusals = await asyncio.gather(refusal(scene.other.key), flood(200))
            return refusals[0] is None

        await eventually(in_in_the_end)
