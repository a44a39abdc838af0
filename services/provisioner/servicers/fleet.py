"""FleetService over gRPC."""

from typing import Any

from grpc.aio import ServicerContext

from september.engine.v1 import engine_pb2
from september.provisioner.v1 import fleet_pb2
from september.provisioner.v1 import fleet_service_pb2 as pb
from september.provisioner.v1.fleet_service_pb2_grpc import FleetServiceServicer
from services.provisioner.domain.audit import AuditEvent
from services.provisioner.domain.fleet import EngineSummary
from services.provisioner.fleet import Fleet
from services.provisioner.servicers.authorization import calling_product, calling_scope
from services.shared.timestamps import to_timestamp


class FleetServicer(FleetServiceServicer):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ListEngines(
        self, request: pb.ListEnginesRequest, context: ServicerContext[Any, Any]
    ) -> pb.ListEnginesResponse:
        scope = calling_scope()
        page = await self._fleet.engines(
            scope, status=request.status, limit=_limit(request), offset=request.offset, token=request.page_token
        )
        return pb.ListEnginesResponse(
            engines=[_engine_message(engine, with_product=scope is None) for engine in page.engines],
            total=page.total,
            next_page_token=page.next_page_token,
        )

    async def GetFleetStatus(
        self, request: pb.GetFleetStatusRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetFleetStatusResponse:
        status = await self._fleet.status(calling_scope())
        return pb.GetFleetStatusResponse(
            total=status.total,
            by_status={str(name): n for name, n in status.by_status.items()},
            health=pb.GetFleetStatusResponse.Health.Value(status.health),
            unhealthy_count=status.unhealthy,
            warm_pool=None
            if status.warm_pool is None
            else fleet_pb2.WarmPool(ready=status.warm_pool.ready, booting=status.warm_pool.booting),
        )

    async def GetFleetMetrics(
        self, request: pb.GetFleetMetricsRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetFleetMetricsResponse:
        scope = calling_scope()
        metrics = await self._fleet.metrics(scope)
        return pb.GetFleetMetricsResponse(
            provisions_1h=metrics.past_hour.provisions,
            crashes_1h=metrics.past_hour.crashes,
            restarts_1h=metrics.past_hour.restarts,
            avg_boot_ms=metrics.past_hour.avg_boot_ms,
            total_provisions=metrics.total_provisions,
            total_destroys=metrics.total_destroys,
            total_claims=metrics.total_claims if scope is None else None,
        )

    async def GetEngineHistory(
        self, request: pb.GetEngineHistoryRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetEngineHistoryResponse:
        history = await self._fleet.history(calling_product().product_id, request.user_id, _limit(request))
        return pb.GetEngineHistoryResponse(
            status=engine_pb2.Engine.Status.Value(history.report.status),
            since=to_timestamp(history.report.status_since),
            summary=history.summary,
            last_admit_at=to_timestamp(history.report.last_admit_at),
            keep_awake_until=to_timestamp(history.report.keep_awake_until),
            events=map(_event_message, history.events),
        )

    async def ListAuditEvents(
        self, request: pb.ListAuditEventsRequest, context: ServicerContext[Any, Any]
    ) -> pb.ListAuditEventsResponse:
        page = await self._fleet.audit_events(
            calling_scope(),
            action=request.action,
            user_id=request.user_id,
            product_id=request.product_id,
            limit=_limit(request),
            token=request.page_token,
        )
        return pb.ListAuditEventsResponse(events=map(_event_message, page.events), next_page_token=page.next_page_token)


def _limit(request: pb.ListEnginesRequest | pb.GetEngineHistoryRequest | pb.ListAuditEventsRequest) -> int | None:
    return request.limit if request.HasField("limit") else None


def _engine_message(engine: EngineSummary, *, with_product: bool) -> fleet_pb2.EngineSummary:
    return fleet_pb2.EngineSummary(
        engine_id=str(engine.engine_id),
        user_id=engine.user_id,
        status=engine_pb2.Engine.Status.Value(engine.status),
        url=engine.url,
        engine_version=engine.image,
        created_at=to_timestamp(engine.created_at),
        last_health_at=to_timestamp(engine.last_health_at),
        product_id=str(engine.product_id) if with_product else None,
    )


def _event_message(event: AuditEvent) -> fleet_pb2.AuditEvent:
    return fleet_pb2.AuditEvent(
        event_id=str(event.event_id),
        at=to_timestamp(event.at),
        action=event.action,
        actor=event.actor,
        outcome=event.outcome,
        product_id=str(event.product_id),
        engine_id=None if event.engine_id is None else str(event.engine_id),
        user_id=event.user_id,
        duration_ms=event.duration_ms,
        error_code=event.error_code,
        detail=event.detail,
        count=event.count,
    )
