"""The rate limit as it is served, over real minutes: four workers on one port, and the gateway with Admission inside.

Each is killed and comes back meanwhile.
"""

import asyncio
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from tests.e2e.gateway_process import Gateway, Inside, running_gateway
from tests.harness import Clients, Platform, Product

pytestmark = pytest.mark.early(20)

MINUTE_S = 60.0
LIMIT = 600
WORKERS = 4
# Of the workers' port and of the gateway; each calls more often than its replica's part of the limit allows.
CALLERS = (12, 3)
PAUSE_S = 0.04
# The kernel chooses a worker by connection: so many calls, and another one is chosen.
CALLS_BY_CONNECTION = 5

Connect = Callable[..., Clients]


class Load:
    """Calls for one product's admits.

    Args:
        addresses: called alike; may be replaced meanwhile.
        product: whose limit is used up.
        spread_s: over which its first admits are spread, as many as the limit, and so are those that replace
            them later. From then on there are more calls than the limit allows.
        duration_s: until its end.
        callers: how many there are for each address.
        pause_s: between two calls of one of them.
    """

    def __init__(
        self,
        addresses: list[str],
        product: Product,
        spread_s: float,
        duration_s: float,
        callers: Sequence[int] = CALLERS,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.admits: list[tuple[float, float]] = []
        """The moments of each admit as its caller knows them: between the two it was decided."""
        self._addresses = addresses
        self._product = product
        self._callers = callers
        self._pause_s = pause_s
        begun = time.monotonic()
        self._moments = iter([begun + spread_s * n / LIMIT for n in range(LIMIT)])
        self.until = begun + duration_s

    async def run(self) -> None:
        await asyncio.gather(*(self._call(index) for index, n in enumerate(self._callers) for _ in range(n)))

    async def _call(self, index: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        while time.monotonic() < self.until:
            async with grpc.aio.insecure_channel(self._addresses[index], options=options) as channel:
                admission = AdmissionServiceStub(channel)
                for _ in range(CALLS_BY_CONNECTION):
                    await asyncio.sleep(max(next(self._moments, 0) - time.monotonic(), self._pause_s))
                    if (begun := time.monotonic()) >= self.until:
                        break
                    try:
                        # Denied for want of an engine, which counts like any other.
                        await admission.Admit(pb.AdmitRequest(user_id="u1"), metadata=self._product.metadata, timeout=5)
                    except grpc.aio.AioRpcError as error:
                        if error.code() is grpc.StatusCode.UNAVAILABLE:
                            # Killed, and back soon.
                            break
                        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                            raise
                    else:
                        self.admits.append((begun, time.monotonic()))

    def most_in_a_minute(self) -> int:
        """The most admits that were decided for certain within one minute."""
        begun = sorted(begin for begin, _ in self.admits)
        ended = sorted(end for _, end in self.admits)
        # Whoever began before the minute has ended within it, at the latest.
        return max(bisect_left(ended, begin + MINUTE_S) - n for n, begin in enumerate(begun))

    def used(self, minutes: int) -> float:
        """Which part of the limit was admitted in the last minutes."""
        since = self.until - minutes * MINUTE_S
        return sum(begin >= since for begin, _ in self.admits) / (LIMIT * minutes)


async def test_in_no_minute_more_than_the_limit_and_hardly_less(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    """All that is admitted in a minute is admitted in its first seconds."""
    await hold(platform, connect, tmp_path, minutes=1, spread_s=5, kill_each_s=15)


@pytest.mark.long
async def test_for_ten_minutes_no_minute_more_than_the_limit_and_hardly_less(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    await hold(platform, connect, tmp_path, minutes=10, spread_s=MINUTE_S, kill_each_s=100)


async def hold(
    platform: Platform, connect: Connect, directory: Path, *, minutes: int, spread_s: float, kill_each_s: float
) -> None:
    """Uses up a product's limit, while a worker and the gateway are killed in turn."""
    provisioner = platform.provisioner()
    workers = platform.admission(provisioner, ORCH_ADMISSION_WORKERS=str(WORKERS))
    product = await connect(platform, provisioner).register(rate_limit_rpm=LIMIT)
    inside = Inside(
        "services.admission.lane:app", {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
    )
    async with AsyncExitStack() as stack:

        async def start_gateway(n: int) -> Gateway:
            home = directory / f"gateway-{n}"
            home.mkdir()
            return await stack.enter_async_context(running_gateway(home, inside, provisioner.address))

        gateway = await start_gateway(0)
        addresses = [workers.address, gateway.address]
        load = Load(addresses, product, spread_s, minutes * MINUTE_S + spread_s + 4)
        # At first when all is used up: before, a replica takes with it what it held in reserve.
        kill_at = load.until - minutes * MINUTE_S + 1
        async with asyncio.TaskGroup() as group:
            running = group.create_task(load.run())
            for kills in itertools.count():
                await asyncio.wait([running], timeout=max(kill_at - time.monotonic(), 0))
                if running.done():
                    break
                if kills == 0:
                    sharing = "SELECT count(*) FROM rate_shares WHERE share > 0"
                    assert platform.query(sharing) == [(WORKERS + 1,)]
                if kills % 2 == 0:
                    psutil.Process(workers.process.pid).children()[0].kill()
                else:
                    gateway.process.kill()
                    gateway = await start_gateway(kills)
                    addresses[1] = gateway.address
                kill_at += kill_each_s
    print(f"{load.used(minutes):.2%} used, {kills} kills, at most {load.most_in_a_minute()} of {LIMIT} in a minute")
    assert load.most_in_a_minute() <= LIMIT
    assert load.used(minutes) >= 0.99
