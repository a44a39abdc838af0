"""AdmissionService over gRPC."""

from typing import Any

from grpc.aio import ServicerContext

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceServicer
from september.engine.v1 import denial_pb2, engine_pb2
from services.admission.admit import Admission
from services.admission.domain import Admitted, Engine
from services.shared.grpc_server import metadata_values
from services.shared.timestamps import to_timestamp

_KEY = "x-platform-key"


class AdmissionServicer(AdmissionServiceServicer):
    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def Admit(self, request: pb.AdmitRequest, context: ServicerContext[Any, Any]) -> pb.AdmitResponse:
        decision = await self._admission.admit(
            metadata_values(context, _KEY),
            request.user_id,
            auto_provision=request.auto_provision,
            auto_wake=request.auto_wake,
            keep_awake_s=request.keep_awake_s,
            timeout_s=context.time_remaining(),
        )
        if isinstance(decision, Admitted):
            return pb.AdmitResponse(admitted=True, engine=_to_message(decision.engine))
        return pb.AdmitResponse(admitted=False, reason=denial_pb2.Denial.Reason.Value(decision.reason))

    async def GetEngine(self, request: pb.GetEngineRequest, context: ServicerContext[Any, Any]) -> pb.GetEngineResponse:
        engine = await self._admission.engine(metadata_values(context, _KEY), request.user_id)
        return pb.GetEngineResponse(engine=_to_message(engine))

    async def CheckHealth(
        self, request: pb.CheckHealthRequest, context: ServicerContext[Any, Any]
    ) -> pb.CheckHealthResponse:
        return pb.CheckHealthResponse(status="ok")


def _to_message(engine: Engine) -> engine_pb2.Engine:
    return engine_pb2.Engine(
        engine_id=str(engine.engine_id),
        user_id=engine.user_id,
        status=engine_pb2.Engine.Status.Value(engine.status),
        url=engine.url,
        api_key=engine.api_key,
        engine_version=engine.engine_version,
        created_at=to_timestamp(engine.created_at),
        last_health_at=to_timestamp(engine.last_health_at),
    )
