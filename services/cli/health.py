"""Waiting for the first sign of health of what has just been started."""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from services.cli import rest
from services.cli.failure import Failure

_PAUSE_S = 0.05
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 50),
)


async def serving(address: str) -> None:
    """Returns when the gRPC server at `address` says that it serves."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        check: Any = HealthStub(channel).Check  # type: ignore[attr-defined] # its stubs know no attributes
        while True:
            with suppress(grpc.aio.AioRpcError):
                answer = await check(HealthCheckRequest(), wait_for_ready=True)
                if answer.status == HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_PAUSE_S)


async def answering(gateway: str) -> None:
    """Returns when `GET /health` of the gateway at `gateway` is answered with 200."""
    while True:
        with suppress(Failure):
            status, _ = await asyncio.to_thread(rest.call, gateway, "GET", "/health")
            if status == 200:
                return
        await asyncio.sleep(_PAUSE_S)
