"""Waiting for the first sign of health of what has just been started."""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from services.cli.failure import Failure
from services.cli.rest import Listener
from services.shared.tls import Identity, channel

_PAUSE_S = 0.05
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 50),
)


async def serving(address: str, part: str, identity: Identity | None) -> None:
    """Returns when this part's gRPC server at `address` says that it serves; see `channel` for the arguments."""
    async with channel(address, part, identity, _OPTIONS) as opened:
        check: Any = HealthStub(opened).Check  # type: ignore[attr-defined] # its stubs know no attributes
        while True:
            with suppress(grpc.aio.AioRpcError):
                answer = await check(HealthCheckRequest(), wait_for_ready=True)
                if answer.status == HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_PAUSE_S)


async def answering(gateway: Listener) -> None:
    """Returns when `GET /health` of the gateway is answered with 200."""
    while True:
        with suppress(Failure):
            status, _ = await asyncio.to_thread(gateway.call, "GET", "/health")
            if status == 200:
                return
        await asyncio.sleep(_PAUSE_S)
