"""Floods of wrong keys: what they get, and what everybody else notices of them."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

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
    async def flood(self, calls_per_s: int) -> AsyncIterator[asyncio.subprocess.Process]:
        flooder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.flooder", self.gateway.address, str(calls_per_s)),
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield flooder
        finally:
            with suppress(ProcessLookupError):
                flooder.kill()
            await flooder.wait()

    async def p99_s(self, calls: int, session: aiohttp.ClientSession) -> float:
        """Of calls with a good key, 200 a second, all admitted; where no processor is idle, not at once."""

        async def call() -> float:
            began = perf_counter()
            headers = {"x-platform-key": self.product.key}
            while perf_counter() < began + DEADLINE_S:
                async with session.post(f"http://{self.gateway.address}/engines/ada/admit", headers=headers) as answer:
                    if answer.status != 503:
                        assert answer.status == 200, await answer.text()
                        assert (await answer.json())["admitted"]
                        return perf_counter() - began
            raise TimeoutError

        began, under_way = perf_counter(), []
        for number in range(calls):
            await asyncio.sleep(max(began + number / 200 - perf_counter(), 0))
            under_way.append(asyncio.create_task(call()))
        return sorted(await asyncio.gather(*under_way))[calls * 99 // 100]

    async def limits(self) -> bool:
        """Whether a wrong key is refused as one of too many."""
        answer = await self.gateway.rest("POST", "/engines/ada/admit", headers=[("x-platform-key", "wrong")])
        return answer.status == 429 and answer.header("retry-after") == "1"

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
    windows, calls = extent(1, 3), extent(200, 1000)
    calm, flooded, sent_per_s, answered_per_s = [], [], [], []
    async with aiohttp.ClientSession() as session:
        # On so many connections that each of the gateway's threads has seen the key.
        await asyncio.gather(*(scene.p99_s(1, session) for _ in range(50)))
        await scene.p99_s(100, session)
        for _ in range(windows):
            calm.append(await scene.p99_s(calls, session))
            async with scene.flood(1000) as flood:
                await eventually(scene.limits)
                flooded.append(await scene.p99_s(calls, session))
                output, _ = await flood.communicate(b"")
            report = json.loads(output)
            answers = report["answers"]
            # Where no processor is idle some get no answer in time.
            assert set(answers) - {"UNAVAILABLE"} == {"INVALID_PLATFORM_KEY", "RATE_LIMITED"}
            assert answers["INVALID_PLATFORM_KEY"] <= 1000 + 100 * report["seconds"]
            sent_per_s.append(report["sent"] / report["seconds"])
            answered_per_s.append(sum(answers.values()) / report["seconds"])
            assert scene.memory() < MOST_MEMORY
    print(
        f"p99 {median(calm) * 1e3:.1f} ms, with {median(sent_per_s):.0f} wrong keys a second, of which"
        f" {median(answered_per_s):.0f} were answered, {median(flooded) * 1e3:.1f} ms"
    )


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
