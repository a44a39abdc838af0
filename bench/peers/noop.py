"""A no-op unary call on the services' own server and event loop: `python -m bench.peers.noop host:port`."""

import asyncio
import sys
from typing import Any

import grpc
import uvloop

from services.shared.grpc_server import GrpcServer

METHOD = "/bench.Noop/Call"


async def _answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return request


async def _serve(address: str) -> None:
    server = GrpcServer(address)
    service, name = METHOD.strip("/").split("/")
    handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(_answer, bytes, bytes)}
    server.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.bind()
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
