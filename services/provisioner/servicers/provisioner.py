"""ProvisionerService over gRPC."""

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from grpc.aio import ServicerContext

from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1 import provisioner_service_pb2 as pb
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceServicer
from services.provisioner.domain.engine import DenialReason, Engine
from services.provisioner.lifecycle import Lifecycle
from services.provisioner.servicers.authorization import calling_product
from services.provisioner.watching import Watching
from services.shared.keys import EngineKeyring
from services.shared.timestamps import to_timestamp


class ProvisionerServicer(ProvisionerServiceServicer):
    def __init__(self, lifecycle: Lifecycle, watching: Watching, keyring: EngineKeyring) -> None:
        self._lifecycle = lifecycle
        self._watching = watching
        self._keyring = keyring

    async def ProvisionEngine(
        self, request: pb.ProvisionEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.ProvisionEngineResponse:
        engine = await self._lifecycle.provision(calling_product(), request.user_id, request.engine_version)
        return pb.ProvisionEngineResponse(
            engine_id=str(engine.engine_id),
            user_id=request.user_id,
            status=engine_pb2.Engine.Status.Value(engine.status),
            url=engine.url,
            api_key=self._keyring.decrypt(engine.engine_id, engine.encrypted_key),
        )

    async def EnsureEngine(
        self, request: pb.EnsureEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.EnsureEngineResponse:
        answer = await self._lifecycle.ensure(
            calling_product(),
            request.user_id,
            auto_provision=request.auto_provision,
            auto_wake=request.auto_wake,
        )
        if isinstance(answer, DenialReason):
            return pb.EnsureEngineResponse(denial=denial_pb2.Denial.Reason.Value(answer))
        return pb.EnsureEngineResponse(engine=self._engine_message(answer, request.user_id))

    async def StartEngine(
        self, request: pb.StartEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.StartEngineResponse:
        engine = await self._lifecycle.start(calling_product(), request.user_id)
        return pb.StartEngineResponse(status=engine_pb2.Engine.Status.running, url=engine.url)

    async def StopEngine(
        self, request: pb.StopEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.StopEngineResponse:
        await self._lifecycle.stop(calling_product(), request.user_id)
        return pb.StopEngineResponse(status=engine_pb2.Engine.Status.stopped)

    async def SleepEngine(
        self, request: pb.SleepEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.SleepEngineResponse:
        await self._lifecycle.sleep(calling_product(), request.user_id)
        return pb.SleepEngineResponse(status=engine_pb2.Engine.Status.sleeping)

    async def WakeEngine(
        self, request: pb.WakeEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.WakeEngineResponse:
        engine = await self._lifecycle.wake(calling_product(), request.user_id)
        return pb.WakeEngineResponse(status=engine_pb2.Engine.Status.running, url=engine.url)

    async def RotateEngineKey(
        self, request: pb.RotateEngineKeyRequest, context: ServicerContext[Any, Any]
    ) -> pb.RotateEngineKeyResponse:
        engine = await self._lifecycle.rotate_key(calling_product(), request.user_id)
        return pb.RotateEngineKeyResponse(api_key=self._keyring.decrypt(engine.engine_id, engine.encrypted_key))

    async def DestroyEngine(
        self, request: pb.DestroyEngineRequest, context: ServicerContext[Any, Any]
    ) -> pb.DestroyEngineResponse:
        engine_id = await self._lifecycle.destroy(calling_product(), request.user_id)
        return pb.DestroyEngineResponse(status="destroyed", engine_id=str(engine_id))

    async def WatchEngine(
        self, request: pb.WatchEngineRequest, context: ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchEngineResponse]:
        async for sighting in self._watching.watch(calling_product(), request.user_id):
            now = Timestamp()
            now.GetCurrentTime()
            yield pb.WatchEngineResponse(
                status=engine_pb2.Engine.Status.Value(sighting.status),
                operation=sighting.operation,
                step=sighting.step,
                at=now,
            )

    def _engine_message(self, engine: Engine, user_id: str) -> engine_pb2.Engine:
        return engine_pb2.Engine(
            engine_id=str(engine.engine_id),
            user_id=user_id,
            status=engine_pb2.Engine.Status.Value(engine.status),
            url=engine.url,
            api_key=self._keyring.decrypt(engine.engine_id, engine.encrypted_key),
            engine_version=engine.image,
            created_at=to_timestamp(engine.created_at),
            last_health_at=to_timestamp(engine.last_health_at),
        )
