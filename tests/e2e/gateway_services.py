"""All services as the gateway sees them: a real gRPC server that answers what a test tells it."""

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2_grpc

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import engine_pb2
from services.cli.gateway import Lane
from services.shared.grpc_server import to_status
from tests.e2e.gateway_calls import SERVICES
from tests.e2e.gateway_process import Gateway, placed, running_gateway

Context = Any
Behaviour = Callable[[Context], Awaitable[Message]]
StreamBehaviour = Callable[[Context], AsyncIterator[Message]]

_METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
# Fields by which a test knows a call; the first that is set counts.
_KEY_FIELDS = ("user_id", "slug", "product_id", "page_token")


@dataclass(frozen=True)
class Call:
    """A call that reached a service."""

    method: str
    request: Any
    metadata: list[tuple[str, str | bytes]]

    def values(self, key: str) -> list[str | bytes]:
        return [value for name, value in self.metadata if name == key]


def engine(user_id: str) -> engine_pb2.Engine:
    """A running engine without an address yet, so that empty fields are seen too."""
    return engine_pb2.Engine(engine_id="e-1", user_id=user_id, status=engine_pb2.Engine.running, api_key="sk-sept-1")


# What success is, where it is more than an empty message.
_SUCCESS: dict[str, Callable[[str], Message]] = {
    "Admit": lambda key: admission_pb.AdmitResponse(admitted=True, engine=engine(key)),
    "GetEngine": lambda key: admission_pb.GetEngineResponse(engine=engine(key)),
    "CheckHealth": lambda key: admission_pb.CheckHealthResponse(status="ok"),
}


@dataclass
class Services(grpc.GenericRpcHandler):
    """Answers every call with a success, or as told for its user_id, slug, product_id or page_token."""

    server: grpc.aio.Server
    address: str = ""
    behaviours: dict[str, Behaviour | StreamBehaviour] = field(default_factory=dict)
    calls: defaultdict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))

    def on(self, behaviour: Behaviour | StreamBehaviour) -> str:
        """A new id, for which calls behave like this."""
        key = str(uuid4())
        self.behaviours[key] = behaviour
        return key

    async def stop(self) -> None:
        """Goes away, whatever is under way."""
        await self.server.stop(None)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = _METHODS.get(details.method)
        if method is None:
            return None
        answer_type = GetMessageClass(method.output_type)

        def noted(request: Any, context: Context) -> tuple[str, Any]:
            key = next((value for name in _KEY_FIELDS if (value := getattr(request, name, ""))), "")
            self.calls[key].append(Call(method.name, request, list(context.invocation_metadata())))
            return key, self.behaviours.get(key)

        async def unary(request: Any, context: Context) -> Any:
            key, behaviour = noted(request, context)
            if behaviour is not None:
                return await behaviour(context)
            return _SUCCESS[method.name](key) if method.name in _SUCCESS else answer_type()

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            _, behaviour = noted(request, context)
            if behaviour is None:
                yield answer_type()
            else:
                async for message in behaviour(context):
                    yield message

        parse, serialize = GetMessageClass(method.input_type).FromString, answer_type.SerializeToString
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parse, serialize)
        return grpc.unary_unary_rpc_method_handler(unary, parse, serialize)


def failing(code: str, message: str, retry_after_s: float | None = None) -> Behaviour:
    """Fails with an error of the table, as the services do."""

    async def behaviour(context: Context) -> Message:
        grpc_code, status = to_status(code, message, retry_after_s)
        await context.abort(grpc_code, message, (("grpc-status-details-bin", status.SerializeToString()),))
        raise AssertionError

    return behaviour


@asynccontextmanager
async def running_services(port: int = 0, *, healthy: bool = False) -> AsyncIterator[Services]:
    """Serves on this port of 127.0.0.1, or on a free one.

    Args:
        healthy: asked for its health, it says that it is well; otherwise it knows no health.
    """
    services = Services(grpc.aio.server())
    services.server.add_generic_rpc_handlers((services,))
    if healthy:
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), services.server)
    services.address = f"127.0.0.1:{services.server.add_insecure_port(f'127.0.0.1:{port}')}"
    await services.server.start()
    try:
        yield services
    finally:
        await services.stop()


@asynccontextmanager
async def gateway_and_services(lane: Lane, directory: Path) -> AsyncIterator[tuple[Gateway, Services]]:
    """A gateway with Admission in this lane, before services that answer for Admission and Provisioner alike."""
    async with (
        running_services() as services,
        running_gateway(directory, placed(lane, services.address), services.address) as gateway,
    ):
        yield gateway, services
