"""The rate limit as it is served: real minutes, over four Admissions that are killed and started again."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from tests.harness import Clients, Platform, Service

MINUTE_S = 60.0
LIMIT = 600
# The moments of an admit as its caller knows them: between the two it was decided.
Admit = tuple[float, float]


async def saturate(clients: Clients, metadata: tuple[tuple[str, str], ...], until: float, admits: list[Admit]) -> None:
    """Calls through all Admissions, more often than the limit allows, until a moment."""

    refused: Counter[grpc.StatusCode] = Counter()

    async def caller(index: int) -> None:
        while (begun := time.monotonic()) < until:
            try:
                # Denied for want of an engine, which counts like any other.
                await clients.admissions[index].Admit(pb.AdmitRequest(user_id="u1"), metadata=metadata, timeout=5)
                admits.append((begun, time.monotonic()))
            except grpc.aio.AioRpcError as error:
                refused[error.code()] += 1
            await asyncio.sleep(0.04)

    await asyncio.gather(*(caller(index) for index in range(len(clients.admissions)) for _ in range(3)))
    # Those of the dead, until they are back.
    assert set(refused) <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


def most_in_a_minute(admits: list[Admit]) -> int:
    """The most admits that were decided for certain within one minute."""
    begun = sorted(begin for begin, _ in admits)
    return max(sum(begin >= start and end < start + MINUTE_S for begin, end in admits) for start in begun)


async def test_in_no_minute_more_than_the_limit_and_hardly_less(
    platform: Platform, connect: Callable[..., Clients]
) -> None:
    await _hold(platform, connect, minutes=1, kill_each_s=25)


@pytest.mark.long
async def test_for_ten_minutes_no_minute_more_than_the_limit_and_hardly_less(
    platform: Platform, connect: Callable[..., Clients]
) -> None:
    await _hold(platform, connect, minutes=10, kill_each_s=45)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def _hold(platform: Platform, connect: Callable[..., Clients], *, minutes: int, kill_each_s: float) -> None:
    provisioner = platform.provisioner()
    ports = [_free_port() for _ in range(4)]

    def start(port: int) -> Service:
        return platform.admission(provisioner, ORCH_ADMISSION_LISTEN=f"127.0.0.1:{port}")

    admissions = [start(port) for port in ports]
    clients = connect(platform, provisioner, *admissions)
    product = await clients.register(rate_limit_rpm=LIMIT)
    admits: list[Admit] = []
    begun = time.monotonic()
    # Past the last full minute, for what is free only a moment after its minute.
    until = begun + minutes * MINUTE_S + 5
    load = asyncio.create_task(saturate(clients, product.metadata, until, admits))
    kills = 0
    while not load.done():
        await asyncio.wait([load], timeout=kill_each_s)
        if not load.done() and time.monotonic() < until - MINUTE_S / 2:
            victim = kills % 4
            admissions[victim].kill()
            admissions[victim] = await asyncio.to_thread(start, ports[victim])
            kills += 1
    await load
    assert kills
    assert most_in_a_minute(admits) <= LIMIT
    assert len(admits) >= 0.99 * LIMIT * (minutes + 1)
