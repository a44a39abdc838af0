"""The Provisioner, wired: reads top to bottom, and alone knows the concrete classes."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID, uuid4

import structlog

from september.provisioner.v1 import fleet_service_pb2_grpc, product_service_pb2_grpc, provisioner_service_pb2_grpc
from services.provisioner.backends.base import Backend, InstanceState
from services.provisioner.backends.chosen import backend_of
from services.provisioner.backends.observed import ObservedBackend
from services.provisioner.boot import Boot
from services.provisioner.domain.intent import Newborn
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.engine_client import HttpEngineClient
from services.provisioner.execution import Executor
from services.provisioner.fleet import Fleet
from services.provisioner.key_rotation import KeyRotation
from services.provisioner.lifecycle import Lifecycle
from services.provisioner.loops.disk import Disk
from services.provisioner.loops.gauges import Gauges
from services.provisioner.loops.health import Health
from services.provisioner.loops.housekeeping import Housekeeping
from services.provisioner.loops.operation_watch import OperationWatch
from services.provisioner.loops.operation_worker import OperationWorker
from services.provisioner.loops.reconciler import Reconciler
from services.provisioner.loops.restarter import Restarter
from services.provisioner.loops.sleeper import Sleeper
from services.provisioner.loops.warm_pool import WarmPool
from services.provisioner.metrics import DISK_FREE_MIN, POOL_SIZE
from services.provisioner.products import Products
from services.provisioner.servicers.authorization import AuthorizationInterceptor
from services.provisioner.servicers.fleet import FleetServicer
from services.provisioner.servicers.idempotency import IdempotencyInterceptor
from services.provisioner.servicers.product import ProductServicer
from services.provisioner.servicers.provisioner import ProvisionerServicer
from services.provisioner.settings import ProvisionerSettings, UrlMode
from services.provisioner.sleep import FallAsleep
from services.provisioner.store.audit import AuditStore
from services.provisioner.store.feed import FeedStore
from services.provisioner.store.fleet import FleetStore
from services.provisioner.store.gauges import GaugeStore
from services.provisioner.store.health import HealthStore
from services.provisioner.store.idempotency import IdempotencyStore
from services.provisioner.store.idle import IdleStore
from services.provisioner.store.installation import installation_id
from services.provisioner.store.intents import IntentStore
from services.provisioner.store.loop_leases import LoopLease
from services.provisioner.store.migrations import migrate
from services.provisioner.store.operations import OperationStore
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.products import ProductStore
from services.provisioner.store.reconcile import ReconcileStore
from services.provisioner.store.warm_pool import WarmPoolStore
from services.provisioner.watching import Watching
from services.shared import embedded_postgres
from services.shared.grpc_server import GrpcServer
from services.shared.keys import EngineKeyring
from services.shared.loops import Broadcast, supervise
from services.shared.metrics_server import serving_metrics
from services.shared.postgres import Connections, Database
from services.shared.service import background
from services.shared.tracing import exporting_traces, traced

log = structlog.get_logger(__name__)

_GRACE_S = 25.0


@asynccontextmanager
async def serve(settings: ProvisionerSettings) -> AsyncIterator[int]:
    """Serves from entry to exit; gives the port."""
    async with (
        serving_metrics(settings.provisioner_metrics_listen),
        exporting_traces("provisioner", settings.traces_addr),
        AsyncExitStack() as stack,
    ):
        url = settings.database_url
        if url is None:
            url = await asyncio.to_thread(embedded_postgres.start, settings.var_dir / "postgres")
        database = Database(url, application_name="september-provisioner", max_size=16)
        products = Products(ProductStore(database), settings.admin_key.get_secret_value())
        keyring = EngineKeyring(settings.master_keys())
        keys = IdempotencyStore(database, keyring)
        server = GrpcServer(
            settings.provisioner_listen,
            [*traced(settings.traces_addr), AuthorizationInterceptor(products), IdempotencyInterceptor(keys)],
            identity=settings.identity(),
        )
        port = server.bind()
        await migrate(url)
        await database.open()
        stack.push_async_callback(database.close)

        backend = ObservedBackend(backend_of(settings, await installation_id(database), settings.catalog_mount_path))
        await backend.open()
        stack.push_async_callback(backend.close)
        if settings.stop_engines_on_exit:
            stack.push_async_callback(_stop_engines, backend)
        engines = HttpEngineClient(settings.health_check_timeout_s)
        await engines.open()
        stack.push_async_callback(engines.close)

        disk = Disk(backend, min_free_bytes=settings.disk_free_min_mib << 20)
        await disk.tick()
        DISK_FREE_MIN.set(settings.disk_free_min_mib << 20)

        port_range = range(settings.port_min, settings.port_max + 1)
        ports = PortAllocator(settings.node, port_range)
        url_of = _network_url if settings.engine_url_mode is UrlMode.NETWORK else _host_url
        owner = uuid4()

        def lease(loop: str) -> LoopLease:
            """For a loop that one Provisioner runs at a time."""
            return LoopLease(database, loop, owner, settings.operation_lease_s)

        filling, sleeping, probing, reconciling = (
            lease(f"{loop}:{settings.node}") for loop in ("warm_pool", "sleeper", "health", "reconciler")
        )
        keeping = lease("housekeeping")

        restarts = RestartPolicy(
            settings.restart_backoff_base_s, settings.restart_backoff_max_s, settings.restart_max_attempts
        )

        def intents_of(registry: Connections) -> IntentStore:
            return IntentStore(
                registry,
                node=settings.node,
                platform_image=settings.image,
                ports=ports,
                url_of=url_of,
                check_disk=disk.check,
            )

        def records_of(registry: Connections) -> HealthStore:
            return HealthStore(
                registry, node=settings.node, max_failures=settings.health_max_failures, restarts=restarts
            )

        intents = intents_of(database)
        operations = OperationStore(
            database,
            owner=owner,
            node=settings.node,
            lease_s=settings.operation_lease_s,
            boot_timeout_s=settings.boot_timeout_s,
            ports=ports,
            url_of=url_of,
            restarts=restarts,
            stale_ok_s=settings.stale_ok_s,
        )
        watch = OperationWatch(operations)
        boot = Boot(
            operations,
            backend,
            engines,
            keyring,
            passthrough={name: os.environ[name] for name in settings.engine_env_passthrough if name in os.environ},
            boot_timeout_s=settings.boot_timeout_s,
            delayed=watch.delay,
        )
        worker = OperationWorker(
            operations,
            Executor(
                operations,
                backend,
                boot,
                FallAsleep(operations, backend, engines),
                KeyRotation(operations, backend, boot, engines, keyring),
            ),
            boot_concurrency=settings.boot_concurrency,
            lease_s=settings.operation_lease_s,
            settled=watch.settle,
            delayed=watch.delay,
        )
        warm_pool = WarmPool(
            WarmPoolStore(database, intents, node=settings.node),
            WarmPoolStore(filling, intents, node=settings.node),
            backend,
            engines,
            lambda: Newborn.of(settings.image, keyring),
            image=settings.image,
            size=settings.warm_pool_size,
            # The other half is for users, also while the pool is being filled.
            most_booting=max(settings.boot_concurrency // 2, 1),
        )
        POOL_SIZE.set(settings.warm_pool_size)
        lifecycle = Lifecycle(
            intents, warm_pool, watch, keyring, image=settings.image, boot_timeout_s=settings.boot_timeout_s
        )

        sleeper = Sleeper(
            IdleStore(sleeping, node=settings.node, stale_ok_s=settings.stale_ok_s),
            intents_of(sleeping),
            backend,
            engines,
            interval_s=settings.sleep_check_interval_s,
            deep_sleep_after_s=settings.deep_sleep_after_s,
        )
        health = Health(records_of(probing), backend, engines, interval_s=settings.health_check_interval_s)
        restarter = Restarter(records_of(database), intents, backend)

        def reconciler_of(registry: Connections) -> Reconciler:
            rows = ReconcileStore(registry, node=settings.node)
            return Reconciler(rows, intents_of(registry), backend, interval_s=settings.reconcile_interval_s)

        audit, fleet = AuditStore(database), FleetStore(database)
        housekeeping = Housekeeping(
            AuditStore(keeping),
            FleetStore(keeping),
            FeedStore(keeping),
            IdempotencyStore(keeping, keyring),
            audit_retention_days=settings.audit_retention_days,
        )

        gauges = Gauges(GaugeStore(database, node=settings.node, ports=port_range), ports=len(port_range))

        changes = Broadcast()
        watching = Watching(intents, changes)

        def wake(news: str) -> None:
            if news in ("", "queued"):
                worker.wake()
            if news != "queued":
                watch.wake()
            changes.give()

        # Before anybody is served: engines may have ended while nobody looked. A first look removes nothing, and
        # what it begins is decided anew under each engine's lock; so it does not matter who leads meanwhile.
        await reconciler_of(database).tick()
        await stack.enter_async_context(
            background(
                supervise(
                    worker=worker.run(),
                    watch=watch.run(),
                    listener=database.listen("operations", wake),
                    steps_listener=database.listen("steps", lambda _: changes.give()),
                    sleeper=sleeping.lead(sleeper.run),
                    health=probing.lead(health.run),
                    restarter=restarter.run(),
                    disk=disk.run(),
                    warm_pool=filling.lead(warm_pool.run),
                    reconciler=reconciling.lead(reconciler_of(reconciling).run),
                    housekeeping=keeping.lead(housekeeping.run),
                    # Read for nobody but Prometheus.
                    **({} if settings.provisioner_metrics_listen is None else {"gauges": gauges.run()}),
                )
            )
        )
        provisioner_service_pb2_grpc.add_ProvisionerServiceServicer_to_server(
            ProvisionerServicer(lifecycle, watching, keyring), server.server
        )
        product_service_pb2_grpc.add_ProductServiceServicer_to_server(ProductServicer(products), server.server)
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(
            FleetServicer(Fleet(fleet, audit, restart_max_attempts=settings.restart_max_attempts)), server.server
        )
        await server.start()
        stack.push_async_callback(server.stop, _GRACE_S)
        stack.callback(watching.stop)
        stack.push_async_callback(server.retire, settings.drain_s)
        log.info("serving", port=port, backend=settings.engine_backend)
        yield port


def _host_url(engine_id: UUID, port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _network_url(engine_id: UUID, port: int) -> str:
    return f"http://engine-{engine_id}:8000"


async def _stop_engines(backend: Backend) -> None:
    running = [i.engine_id for i in await backend.list() if i.state in (InstanceState.RUNNING, InstanceState.FROZEN)]
    await asyncio.gather(*(backend.stop(engine_id, grace_s=_GRACE_S) for engine_id in running))
