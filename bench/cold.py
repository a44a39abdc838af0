"""What the platform adds to Docker: `python -m bench.cold [pairs]`, JSON on stdout.

Every pair does the same thing twice, in turns which is first: by the SDK alone, and by a call to a
running Provisioner over gRPC. The container is the same, with all its limits; what differs is who
asks for it. `cold` is create, start, and the first healthy answer; `wake` is unpause and the first
answer. Times are in milliseconds, ratios are of the medians.
"""

import asyncio
import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
from docker import APIClient

from bench.containers import IMAGE, docker_platform
from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.provisioner.backends.base import EngineSpec
from services.provisioner.backends.engine_template import EngineTemplate
from services.shared import embedded_postgres
from tests.harness import Clients, Platform, Product, new_database, reason
from tests.integration.docker_daemon import remove_all

TARGETS = {"cold": 1.15, "wake": 1.5, "wake by admit": None}
_PAIRS = 20
_PORTS = {"ORCH_PORT_MIN": "25000", "ORCH_PORT_MAX": "25499"}
_BARE_PORT = 25500
_POLL_S = 0.002
# Docker is slower with an engine that it has not just dealt with.
_ASLEEP_S = 0.2
_MEMORY_BYTES = 512 * 1024 * 1024

Timed = Callable[[], Awaitable[float]]


class Bare:
    """Engines by the SDK alone."""

    def __init__(self, api: APIClient, network: str) -> None:
        self._api = api
        self._installation = str(uuid4())
        self._template = EngineTemplate(self._installation, network, None, _MEMORY_BYTES, 1.0, 256)
        self._ids = count()

    def cold(self) -> tuple[float, str, int]:
        """Makes an engine; how long that took, its container, and its port."""
        number = next(self._ids)
        engine_id, port = UUID(int=number), _BARE_PORT + number
        environment = {"ENGINE_KEY_HASH": sha256(b"bench").hexdigest()}
        options = self._template.options(self._api, EngineSpec(engine_id, 1, IMAGE, port, environment))
        begun = time.perf_counter()
        container: str = self._api.create_container(**options)["Id"]
        self._api.start(container)
        await_answer(port)
        return time.perf_counter() - begun, container, port

    def wake(self, container: str, port: int) -> float:
        self._api.pause(container)
        time.sleep(_ASLEEP_S)
        begun = time.perf_counter()
        self._api.unpause(container)
        await_answer(port)
        return time.perf_counter() - begun

    def remove(self, container: str) -> None:
        self._api.remove_container(container, force=True, v=True)

    def close(self) -> None:
        remove_all(self._api, self._installation)


def await_answer(port: int) -> None:
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            if response.status == 200 and json.load(response)["status"] == "ok":
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(_POLL_S)


class User:
    """Engines by the platform."""

    def __init__(self, clients: Clients, product: Product) -> None:
        self._clients = clients
        self._metadata = product.metadata
        self._ids = count()

    async def cold(self) -> tuple[float, str]:
        """Makes an engine; how long that took, and whose it is."""
        user_id = f"u{next(self._ids)}"
        begun = time.perf_counter()
        await self._clients.provisioner.ProvisionEngine(
            pb.ProvisionEngineRequest(user_id=user_id), metadata=self._metadata
        )
        return time.perf_counter() - begun, user_id

    async def wake(self, user_id: str) -> float:
        await self._sleep(user_id)
        begun = time.perf_counter()
        await self._clients.provisioner.WakeEngine(pb.WakeEngineRequest(user_id=user_id), metadata=self._metadata)
        return time.perf_counter() - begun

    async def wake_by_admit(self, user_id: str) -> float:
        await self._sleep(user_id)
        request = admission_pb.AdmitRequest(user_id=user_id, auto_wake=True)
        begun = time.perf_counter()
        answer = await self._clients.admission.Admit(request, metadata=self._metadata)
        assert answer.admitted
        return time.perf_counter() - begun

    async def _sleep(self, user_id: str) -> None:
        """Not under those who have just been let in, so it may have to be asked for again."""
        request = pb.SleepEngineRequest(user_id=user_id)
        while True:
            try:
                await self._clients.provisioner.SleepEngine(request, metadata=self._metadata)
                break
            except grpc.aio.AioRpcError as error:
                if reason(error) != "UNAVAILABLE":
                    raise
        await asyncio.sleep(_ASLEEP_S)

    async def destroy(self, user_id: str) -> None:
        await self._clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id=user_id), metadata=self._metadata)


async def in_pairs(pairs: int, bare: Timed, platform: Timed) -> tuple[list[float], list[float]]:
    """The times of both, each first in every second pair; one pair before that counts for nothing."""
    bares: list[float] = []
    platforms: list[float] = []
    for number in range(pairs + 1):
        for timed, times in ((bare, bares), (platform, platforms))[:: 1 if number % 2 else -1]:
            times.append(await timed())
    return bares[1:], platforms[1:]


async def measure(bare: Bare, user: User, pairs: int) -> dict[str, tuple[list[float], list[float]]]:
    async def bare_cold() -> float:
        seconds, container, _ = await asyncio.to_thread(bare.cold)
        await asyncio.to_thread(bare.remove, container)
        return seconds

    async def platform_cold() -> float:
        seconds, user_id = await user.cold()
        await user.destroy(user_id)
        return seconds

    times = {"cold": await in_pairs(pairs, bare_cold, platform_cold)}
    _, container, port = await asyncio.to_thread(bare.cold)
    _, user_id = await user.cold()

    async def bare_wake() -> float:
        return await asyncio.to_thread(bare.wake, container, port)

    times["wake"] = await in_pairs(pairs, bare_wake, lambda: user.wake(user_id))
    times["wake by admit"] = await in_pairs(pairs, bare_wake, lambda: user.wake_by_admit(user_id))
    return times


def summary(what: str, bare: list[float], platform: list[float]) -> dict[str, Any]:
    bare_ms, platform_ms = (statistics.median(times) * 1000 for times in (bare, platform))
    ratio, target = platform_ms / bare_ms, TARGETS[what]
    return {
        "bare_ms": round(bare_ms, 1),
        "platform_ms": round(platform_ms, 1),
        "ratio": round(ratio, 3),
        "target": target,
        "met": target is None or ratio <= target,
        "pairs": len(bare),
    }


async def run(platform: Platform, api: APIClient, pairs: int) -> dict[str, Any]:
    provisioner = platform.provisioner(**_PORTS)
    clients = Clients(platform, provisioner.address, platform.admission(provisioner).address)
    bare = Bare(api, platform.environment["ORCH_ENGINE_NETWORK"])
    try:
        product = await clients.register(max_engines=1000, rate_limit_rpm=100_000)
        times = await measure(bare, User(clients, product), pairs)
    finally:
        await clients.close()
        bare.close()
    return {what: summary(what, *both) for what, both in times.items()}


def measure_pairs(database_url: str, directory: Path, pairs: int) -> dict[str, Any]:
    """Both, in a platform of their own on an empty database."""
    with docker_platform(database_url, directory) as (platform, api):
        return asyncio.run(run(platform, api, pairs))


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else _PAIRS
    with tempfile.TemporaryDirectory(prefix="september-") as directory:
        data_dir = Path(directory) / "postgres"
        url = embedded_postgres.start(data_dir)
        try:
            result = measure_pairs(new_database(url), Path(directory) / "cold", pairs)
        finally:
            embedded_postgres.stop(data_dir)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
