"""Every part restarted, one after the other, under callers who notice nothing."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import pytest

from services.cli.gateway import Lane, lane_environment
from tests.chaos.oracle import oracle
from tests.chaos.rolling_load import mixed_load
from tests.chaos.score_card import Score
from tests.e2e.gateway_process import Gateway, started_gateway
from tests.harness import Clients, Platform, Service
from tests.integration.backend_rigs import free_port

pytestmark = pytest.mark.early(150)

FIGURE = "requests failed in 100 rolling restarts"
# More than a health check of the gateway takes to notice.
DRAIN = {"ORCH_DRAIN_S": "2.5"}


class Part(Protocol):
    """Of which there are two, so that one can go."""

    async def start(self) -> None: ...
    async def end(self) -> None: ...


class ServicePart:
    """A Provisioner or an Admission, always on the same port."""

    def __init__(self, platform: Platform, name: str, **settings: str) -> None:
        self._platform = platform
        self._name = name
        self.address = f"127.0.0.1:{free_port()}"
        self._settings = {f"ORCH_{name.upper()}_LISTEN": self.address, **DRAIN, **settings}

    async def start(self) -> None:
        self.service: Service = await asyncio.to_thread(self._platform.start, self._name, **self._settings)

    async def end(self) -> None:
        assert await asyncio.to_thread(self.service.terminate) == 0


class GatewayPart:
    """A gateway, always on the same port."""

    def __init__(self, platform: Platform, lane: Lane, **settings: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        var = platform.directory / f"gateway-{self.address}"
        (var / "run").mkdir(parents=True)
        self._admin_file = var / "run" / "gateway.admin"
        self._environment = {
            "PATH": os.environ["PATH"],
            **platform.environment,
            "ORCH_VAR_DIR": str(var),
            "ORCH_GATEWAY_LISTEN": self.address,
            "ORCH_GATEWAY_ADMIN_LISTEN": "127.0.0.1:0",
            **DRAIN,
            **settings,
        }
        self._command = [sys.executable, "-m", "services.cli", "gateway", "--lane", lane]

    async def start(self) -> None:
        self._admin_file.unlink(missing_ok=True)
        self._stack = AsyncExitStack()
        running = started_gateway(self._command, self._environment, self._admin_file)
        self.gateway: Gateway = await self._stack.enter_async_context(running)

    async def end(self) -> None:
        await self._stack.aclose()


async def roll(part: Part) -> None:
    await part.end()
    await part.start()


@asynccontextmanager
async def two_of_each(platform: Platform, lane: Lane) -> AsyncIterator[tuple[list[list[Part]], list[str]]]:
    """The parts, of which there are two of a kind, and the gateways' addresses."""
    provisioners = [ServicePart(platform, "provisioner", ORCH_OPERATION_LEASE_S="2") for _ in range(2)]
    addresses = {"ORCH_PROVISIONER_ADDR": ",".join(part.address for part in provisioners)}
    kinds: list[list[Part]] = [[*provisioners]]
    if lane is Lane.GRPC:
        admissions = [ServicePart(platform, "admission", **addresses, ORCH_ADMISSION_WORKERS=n) for n in "12"]
        addresses["ORCH_ADMISSION_ADDR"] = ",".join(part.address for part in admissions)
        kinds.append([*admissions])
    gateways = [GatewayPart(platform, lane, **addresses) for _ in range(2)]
    kinds.append([*gateways])
    async with AsyncExitStack() as stack:
        for kind in kinds:
            await asyncio.gather(*(part.start() for part in kind))
        for gateway in gateways:
            stack.push_async_callback(gateway.end)
        yield kinds, [gateway.address for gateway in gateways]


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.figure(FIGURE)
async def test_no_request_fails_while_every_part_is_restarted(
    platform: Platform, lane: Lane, score: Score, extent: Callable[[int, int], int]
) -> None:
    """In each round one of every kind is restarted, all at the same time."""
    if lane is Lane.FAST and lane_environment() is None:
        pytest.skip("this Python has no libpython")
    async with two_of_each(platform, lane) as (kinds, gateways):
        provisioner = kinds[0][0]
        assert isinstance(provisioner, ServicePart)
        clients = Clients(platform, provisioner.address)
        product = await clients.register()
        await clients.close()
        async with mixed_load(gateways, product) as callers:
            rounds = extent(1, 20)
            for turn in range(rounds):
                rolls: list[Awaitable[None]] = [roll(kind[turn % 2]) for kind in kinds]
                await asyncio.gather(*rolls)
        score(FIGURE, f"{len(callers.failures)} in {rounds * len(kinds)}", not callers.failures)
        assert callers.failures == []
        # All of them were made all the while.
        assert min(callers.calls[what] for what in ("REST admit", "REST provision", "SleepEngine", "WatchEngine")) > 0
        await asyncio.to_thread(oracle, platform)
