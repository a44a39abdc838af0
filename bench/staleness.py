"""How long a replica of Admission goes on answering from what it remembers after a change.

Each change is made by its own call, and timed from that call's answer to the first admit that
knows of it: with notifications, and with every one of them lost.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from september.admission.v1 import admission_service_pb2 as pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as provisioner_pb
from tests.harness import Clients, Platform, Product, running_platform

_USER = "u1"

Times = dict[str, list[float]]
"""Milliseconds by the change."""

_Change = Callable[[Clients, Product], Awaitable[None]]


async def _destroy(clients: Clients, product: Product) -> None:
    await clients.provisioner.DestroyEngine(
        provisioner_pb.DestroyEngineRequest(user_id=_USER), metadata=product.metadata
    )


async def _sleep(clients: Clients, product: Product) -> None:
    while True:
        try:
            await clients.provisioner.SleepEngine(
                provisioner_pb.SleepEngineRequest(user_id=_USER), metadata=product.metadata
            )
            return
        except grpc.aio.AioRpcError as error:
            # Not under those who have just been let in.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


async def _revoke(clients: Clients, product: Product) -> None:
    request = product_pb.RotatePlatformKeyRequest(product_id=product.product_id, grace_s=0)
    await clients.products.RotatePlatformKey(request, metadata=clients.admin)


async def _tighten(clients: Clients, product: Product) -> None:
    request = product_pb.UpdatePolicyRequest(product_id=product.product_id)
    request.policy.update({"max_engines": 1, "rate_limit_rpm": 1})
    await clients.products.UpdatePolicy(request, metadata=clients.admin)


CHANGES: dict[str, _Change] = {
    "engine destroyed": _destroy,
    "key revoked": _revoke,
    "policy tightened": _tighten,
    "engine put to sleep": _sleep,
}


def measure(database_url: str, directory: Path, rounds: int) -> dict[str, Times]:
    """Every change so many times, `notified` and `mute`.

    Args:
        database_url: an empty database.
        directory: for all that the processes write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with running_platform(database_url, directory, ORCH_PORT_MIN="22000", ORCH_PORT_MAX="22999") as platform:
        return asyncio.run(_measure(platform, rounds))


async def _measure(platform: Platform, rounds: int) -> dict[str, Times]:
    provisioner = platform.provisioner()
    clients = Clients(platform, provisioner.address, platform.admission(provisioner).address)
    times: dict[str, Times] = {}
    for way in ("notified", "mute"):
        if way == "mute":
            platform.lose_notifications()
        times[way] = {name: [await _once(clients, change) for _ in range(rounds)] for name, change in CHANGES.items()}
    await clients.close()
    return times


async def _once(clients: Clients, change: _Change) -> float:
    product = await clients.register()
    made = pb.AdmitRequest(user_id=_USER, auto_provision=True)
    assert (await clients.admission.Admit(made, metadata=product.metadata)).admitted
    assert await _admits(clients, product)
    await change(clients, product)
    begun = time.perf_counter()
    while await _admits(clients, product):
        pass
    return (time.perf_counter() - begun) * 1000


async def _admits(clients: Clients, product: Product) -> bool:
    try:
        answer = await clients.admission.Admit(pb.AdmitRequest(user_id=_USER), metadata=product.metadata)
    except grpc.aio.AioRpcError:
        return False
    return answer.admitted
