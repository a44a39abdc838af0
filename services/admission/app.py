"""Admission, wired: reads top to bottom, and alone knows the concrete classes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID, uuid4

import structlog

from services.admission import replica
from services.admission.activity import ActivityLog
from services.admission.admit import Admission
from services.admission.calls import AdmissionCalls
from services.admission.metrics import LIMITER_WAITING, REMEMBERED, SHARES, STALE
from services.admission.provisioner_client import ProvisionerClient
from services.admission.ratelimit import LeasedLimiter
from services.admission.ratelimit_sql import SqlLedger, forget_replica
from services.admission.read_model import ReadModel
from services.admission.registry_sql import SqlRegistry
from services.admission.servicer import handlers
from services.admission.settings import AdmissionSettings
from services.admission.workers import serve_by_workers
from services.shared import embedded_postgres
from services.shared.grpc_server import GrpcServer
from services.shared.keys import EngineKeyring
from services.shared.loops import supervise
from services.shared.metrics import REGISTRY_AGE
from services.shared.metrics_server import serving_metrics
from services.shared.postgres import Database
from services.shared.service import background
from services.shared.tracing import exporting_traces, traced

log = structlog.get_logger(__name__)

_GRACE_S = 25.0


@asynccontextmanager
async def serve(settings: AdmissionSettings) -> AsyncIterator[int]:
    """Serves over `grpc.aio` from entry to exit, by as many processes as told; gives the port."""
    served = serve_by_workers(settings) if settings.admission_workers > 1 else _serve(settings, share_port=False)
    async with served as port:
        yield port


@asynccontextmanager
async def serve_as_worker(settings: AdmissionSettings) -> AsyncIterator[int]:
    """Serves as one of several processes on the same port; says so on standard output."""
    async with _serve(settings, share_port=True) as port:
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        yield port


@asynccontextmanager
async def _serve(settings: AdmissionSettings, *, share_port: bool) -> AsyncIterator[int]:
    server = GrpcServer(
        settings.admission_listen,
        traced(settings.traces_addr),
        share_port=share_port,
        identity=settings.identity(),
    )
    port = server.bind()
    async with core(settings) as calls, AsyncExitStack() as stack:
        server.server.add_generic_rpc_handlers((handlers(calls),))
        await server.start()
        stack.push_async_callback(server.stop, _GRACE_S)
        stack.push_async_callback(server.retire, settings.drain_s)
        log.info("worker_serving" if share_port else "serving", port=port)
        yield port


@asynccontextmanager
async def core(settings: AdmissionSettings) -> AsyncIterator[AdmissionCalls]:
    """All that decides, open from entry to exit, without a host that brings it calls."""
    async with (
        serving_metrics(settings.admission_metrics_listen),
        exporting_traces("admission", settings.traces_addr),
        AsyncExitStack() as stack,
    ):
        url = settings.database_url
        if url is None:
            url = await asyncio.to_thread(embedded_postgres.start, settings.var_dir / "postgres")
        database = Database(url, application_name="september-admission")
        await database.open()
        stack.push_async_callback(database.close)
        provisioner = ProvisionerClient(
            settings.provisioner_addr, boot_timeout_s=settings.boot_timeout_s, identity=settings.identity()
        )
        await provisioner.open()
        stack.push_async_callback(provisioner.close)

        registry = ReadModel(
            SqlRegistry(database, EngineKeyring(settings.master_keys())), stale_ok_s=settings.stale_ok_s
        )
        await registry.tick()
        replica_id, replicas = uuid4(), settings.var_dir / "admission"
        stack.enter_context(replica.alive(replicas, replica_id))
        activity = ActivityLog(database, replica_id, lambda: registry.known_at)

        async def bury(dead: UUID) -> None:
            await activity.bury(dead)
            await forget_replica(database, dead)

        await replica.bury_dead(replicas, bury)
        await activity.open()
        stack.push_async_callback(activity.close)
        ledger = SqlLedger(database, replica_id, stale_ok_s=settings.stale_ok_s)
        stack.push_async_callback(ledger.close)
        limiter = LeasedLimiter(ledger, stale_ok_s=settings.stale_ok_s)
        stack.push_async_callback(limiter.close)
        _observe(registry, limiter)
        await stack.enter_async_context(
            background(
                supervise(
                    registry=registry.run(),
                    listener=database.listen("changes", registry.hear),
                    activity=activity.run(),
                    limiter=limiter.run(),
                    burials=replica.watch(replicas, bury),
                )
            )
        )
        yield AdmissionCalls(Admission(registry, limiter, provisioner, activity))


def _observe(registry: ReadModel, limiter: LeasedLimiter) -> None:
    """Has looked at, whenever Prometheus asks, what these know of themselves."""
    REGISTRY_AGE.set_function(registry.age_s)
    STALE.set_function(registry.stale)
    REMEMBERED.labels("keys").set_function(lambda: registry.remembered()[0])
    REMEMBERED.labels("engines").set_function(lambda: registry.remembered()[1])
    SHARES.set_function(limiter.held)
    LIMITER_WAITING.set_function(limiter.waiting)
