"""Both services as the gateway sees them: real gRPC servers that answer what a test tells them."""

# ruff: noqa: N802 - gRPC names the methods

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf.message import Message

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.admission.v1 import admission_service_pb2_grpc as admission_grpc
from september.engine.v1 import engine_pb2
from september.provisioner.v1 import product_pb2, provisioner_service_pb2_grpc
from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import product_service_pb2_grpc as product_grpc
from september.provisioner.v1 import provisioner_service_pb2 as provisioner_pb
from services.shared.grpc_server import to_status

Context = Any
Behaviour = Callable[[Context], Awaitable[Message]]


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


@dataclass
class Services(
    admission_grpc.AdmissionServiceServicer,
    provisioner_service_pb2_grpc.ProvisionerServiceServicer,
    product_grpc.ProductServiceServicer,
):
    """Answers every call with a success, or as told for its user_id, slug or product_id."""

    server: grpc.aio.Server
    address: str
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    calls: defaultdict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))

    def on(self, behaviour: Behaviour) -> str:
        """A new id, for which calls behave like this."""
        key = str(uuid4())
        self.behaviours[key] = behaviour
        return key

    async def stop(self) -> None:
        """Goes away, whatever is under way."""
        await self.server.stop(None)

    async def _answer(self, key: str, request: Message, context: Context, success: Message) -> Any:
        method = type(request).__name__.removesuffix("Request")
        self.calls[key].append(Call(method, request, list(context.invocation_metadata())))
        behaviour = self.behaviours.get(key)
        return success if behaviour is None else await behaviour(context)

    async def Admit(self, request: admission_pb.AdmitRequest, context: Context) -> Any:
        success = admission_pb.AdmitResponse(admitted=True, engine=engine(request.user_id))
        return await self._answer(request.user_id, request, context, success)

    async def GetEngine(self, request: admission_pb.GetEngineRequest, context: Context) -> Any:
        success = admission_pb.GetEngineResponse(engine=engine(request.user_id))
        return await self._answer(request.user_id, request, context, success)

    async def CheckHealth(self, request: admission_pb.CheckHealthRequest, context: Context) -> Any:
        return await self._answer("", request, context, admission_pb.CheckHealthResponse(status="ok"))

    async def ProvisionEngine(self, request: provisioner_pb.ProvisionEngineRequest, context: Context) -> Any:
        success = provisioner_pb.ProvisionEngineResponse(user_id=request.user_id, status=engine_pb2.Engine.running)
        return await self._answer(request.user_id, request, context, success)

    async def DestroyEngine(self, request: provisioner_pb.DestroyEngineRequest, context: Context) -> Any:
        success = provisioner_pb.DestroyEngineResponse(status="destroyed", engine_id="e-1")
        return await self._answer(request.user_id, request, context, success)

    async def EnsureEngine(self, request: provisioner_pb.EnsureEngineRequest, context: Context) -> Any:
        return await self._answer(request.user_id, request, context, provisioner_pb.EnsureEngineResponse())

    async def RegisterProduct(self, request: product_pb.RegisterProductRequest, context: Context) -> Any:
        success = product_pb.RegisterProductResponse(slug=request.slug)
        return await self._answer(request.slug, request, context, success)

    async def UpdatePolicy(self, request: product_pb.UpdatePolicyRequest, context: Context) -> Any:
        success = product_pb.UpdatePolicyResponse(policy=product_pb2.Policy(max_engines=5))
        return await self._answer(request.product_id, request, context, success)


def failing(code: str, message: str, retry_after_s: float | None = None) -> Behaviour:
    """Fails with an error of the table, as the services do."""

    async def behaviour(context: Context) -> Message:
        grpc_code, status = to_status(code, message, retry_after_s)
        await context.abort(grpc_code, message, (("grpc-status-details-bin", status.SerializeToString()),))
        raise AssertionError

    return behaviour


@asynccontextmanager
async def running_services(port: int = 0) -> AsyncIterator[Services]:
    """Serves on this port of 127.0.0.1, or on a free one."""
    server = grpc.aio.server()
    services = Services(server, f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}")
    admission_grpc.add_AdmissionServiceServicer_to_server(services, server)
    provisioner_service_pb2_grpc.add_ProvisionerServiceServicer_to_server(services, server)
    product_grpc.add_ProductServiceServicer_to_server(services, server)
    await server.start()
    try:
        yield services
    finally:
        await services.stop()
