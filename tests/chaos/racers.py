"""Callers in processes of their own, who call at the same moment."""

import asyncio
import multiprocessing
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing.synchronize import Barrier

import grpc

from september.provisioner.v1 import provisioner_service_pb2 as pb
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub
from tests.harness import Product, reason

PATIENCE_S = 120.0


Groups = Sequence[Sequence[str]]


def race(addresses: Sequence[str], product: Product, groups: Sequence[Groups]) -> list[list[str]]:
    """Processes ask for engines of their users, the n-th group of each at the same moment, and then destroy them.

    Args:
        addresses: of Provisioners, which they call in turn.
        product: whose users they are.
        groups: of users, those of each process.

    Returns:
        What each process got for each of its users: the engine's id, or the code of the error.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(groups))
    with context.Pool(len(groups), _join, (barrier,)) as pool:
        work = [(own, [*addresses[n % len(addresses) :], *addresses], product) for n, own in enumerate(groups)]
        return pool.starmap_async(_run, work, chunksize=1).get(PATIENCE_S * 10)


_barrier: Barrier


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run(groups: Groups, addresses: Sequence[str], product: Product) -> list[str]:
    return asyncio.run(_call(groups, addresses, product))


async def _call(groups: Groups, addresses: Sequence[str], product: Product) -> list[str]:
    channels = [grpc.aio.insecure_channel(address) for address in addresses]
    stubs = cycle([ProvisionerServiceStub(channel) for channel in channels])

    async def ensure(user_id: str) -> str:
        request = pb.EnsureEngineRequest(user_id=user_id, auto_provision=True)
        try:
            answer = await next(stubs).EnsureEngine(request, metadata=product.metadata, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            return reason(error)
        return answer.engine.engine_id

    async def destroy(user_id: str) -> None:
        request = pb.DestroyEngineRequest(user_id=user_id)
        with suppress(grpc.aio.AioRpcError):
            await next(stubs).DestroyEngine(request, metadata=product.metadata, timeout=PATIENCE_S)

    got = []
    for group in groups:
        await asyncio.to_thread(_barrier.wait, PATIENCE_S)
        got += await asyncio.gather(*map(ensure, group))
        # Nobody destroys what another is still asking for.
        await asyncio.to_thread(_barrier.wait, PATIENCE_S)
        await asyncio.gather(*map(destroy, group))
    for channel in channels:
        await channel.close()
    return got
