"""What the services tell Prometheus, asked over HTTP as it does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import grpc
import psutil
import psycopg
import pytest
from prometheus_client import REGISTRY

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.provisioner.v1.provisioner_service_pb2 import DestroyEngineRequest, ProvisionEngineRequest
from services.provisioner.loops.gauges import Gauges
from services.provisioner.store.gauges import GaugeStore
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Service, eventually, reason
from tests.scrape import Scrape, documented, metrics_ports, scrape

ADMISSION = {"ORCH_ADMISSION_METRICS_LISTEN": "127.0.0.1:0"}
PROVISIONER = {"ORCH_PROVISIONER_METRICS_LISTEN": "127.0.0.1:0"}


def of(service: Service) -> Scrape:
    [port] = metrics_ports(service)
    return scrape(port)


async def test_what_happens_is_counted_and_nothing_that_callers_say_is_told(
    platform: Platform, connect: Callable[..., Clients]
) -> None:
    provisioner = platform.provisioner(**PROVISIONER)
    admission = platform.admission(provisioner, **ADMISSION)
    clients = connect(platform, provisioner, admission)
    product = await clients.register(rate_limit_rpm=1000)
    request = AdmitRequest(user_id="somebody-canary", auto_provision=True)
    answer = await clients.admission.Admit(request, metadata=product.metadata)
    await clients.admission.Admit(request, metadata=product.metadata)
    await clients.admission.Admit(AdmitRequest(user_id="nobody"), metadata=product.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await clients.admission.Admit(request, metadata=(("x-platform-key", "pk-sept-unknown"),))
    assert reason(failure.value) == "INVALID_PLATFORM_KEY"
    keyed = (*product.metadata, ("idempotency-key", "once"))
    for _ in range(2):
        await clients.provisioner.DestroyEngine(DestroyEngineRequest(user_id="somebody-canary"), metadata=keyed)

    decided = of(admission)
    assert decided.names >= documented("Both services", "Admission")
    assert decided("september_admits_total", answer="admitted") == 2
    assert decided("september_admits_total", answer="engine_not_found") == 1
    assert decided("september_errors_total", code="INVALID_PLATFORM_KEY") == 1
    assert decided("september_provisioner_call_seconds_count", result="answered") == 1
    assert decided("september_read_model_stale") == 0
    assert decided("september_registry_age_seconds") < 4
    assert decided("september_read_model_entries", of="keys") >= 1
    assert decided("september_limiter_share") > 0
    assert decided("september_limiter_exchanges_total", result="answered") >= 1
    assert decided("september_postgres_requests_total") > 0
    eventually(lambda: of(admission)("september_limiter_tokens_total") == 3, "all tokens are counted")
    eventually(lambda: of(admission)("september_event_loop_lag_seconds_count") > 0, "the loop is looked at")

    carried_out = of(provisioner)
    assert carried_out.names >= documented("Both services", "Provisioner")
    assert carried_out("september_operations_total", kind="provision", result="succeeded") == 1
    assert carried_out("september_operation_seconds_count", kind="provision") == 1
    assert carried_out("september_backend_call_seconds_count", call="create", result="done") == 1
    assert carried_out("september_idempotency_replays_total") == 1
    for text in (decided.text, carried_out.text):
        for secret in (*answer.engine.api_key.split(), product.key, product.slug, product.product_id, "canary"):
            assert secret not in text


async def test_the_registrys_numbers_are_told(platform: Platform, connect: Callable[..., Clients]) -> None:
    ports = {"ORCH_PORT_MIN": "20000", "ORCH_PORT_MAX": "20009"}
    provisioner = platform.provisioner(ORCH_WARM_POOL_SIZE="1", **PROVISIONER, **ports)
    eventually(lambda: of(provisioner)("september_warm_pool_engines", state="ready") == 1, "the pool is full")
    now = of(provisioner)
    assert now("september_warm_pool_size") == 1
    assert (now("september_ports", state="leased"), now("september_ports", state="free")) == (1, 9)
    assert now("september_loop_lease_term", loop="warm_pool") == 1
    assert now("september_registry_age_seconds") < 10

    product = await (clients := connect(platform, provisioner)).register()
    await clients.provisioner.ProvisionEngine(ProvisionEngineRequest(user_id="ada"), metadata=product.metadata)
    platform.query(
        "INSERT INTO operations (operation_id, engine_id, node, kind, actor, quarantined_at, created_at)"
        " SELECT gen_random_uuid(), engine_id, 'elsewhere', 'stop', 'x', now(), now() - interval '1 day'"
        " FROM engines WHERE user_id = 'ada'"
    )
    database = Database(platform.database_url, application_name="test")
    await database.open()
    gauges = Gauges(GaugeStore(database, node="local", ports=range(20000, 20010)), ports=10)
    await gauges.tick()
    told = REGISTRY.get_sample_value
    assert told("september_engines", {"status": "running"}) == 1
    assert told("september_operations_quarantined") == 1
    # Nobody waits for it.
    assert (told("september_operations_oldest_seconds") or 0) < 60
    platform.query("UPDATE operations SET quarantined_at = NULL WHERE node = 'elsewhere'")
    await gauges.tick()
    assert (told("september_operations_oldest_seconds") or 0) > 80_000
    assert told("september_operations_open", {"queue": "other"}) == 1
    # A large volume takes long to copy.
    platform.query("UPDATE operations SET kind = 'backup' WHERE node = 'elsewhere'")
    await gauges.tick()
    await database.close()
    assert (told("september_operations_oldest_seconds") or 0) < 60


async def test_an_unreachable_registry_shows(platform: Platform) -> None:
    provisioner = platform.provisioner(**PROVISIONER)
    admission = platform.admission(provisioner, **ADMISSION)
    assert of(admission)("september_read_model_stale") == 0
    with unreachable(platform):
        eventually(lambda: of(admission)("september_read_model_stale") == 1, "the read model is stale")
        for service in (admission, provisioner):
            eventually(lambda s=service: of(s)("september_registry_age_seconds") > 6, "the registry's silence is seen")
            assert of(service)("september_registry_errors_total") > 0
        assert of(admission)("september_activity_flushes_total", result="failed") > 0
    for service in (admission, provisioner):
        eventually(lambda s=service: of(s)("september_registry_age_seconds") < 6, "the registry is heard again")
    eventually(lambda: of(admission)("september_read_model_stale") == 0, "the read model is true again")


def test_each_worker_has_a_port_of_its_own(platform: Platform) -> None:
    provisioner = platform.provisioner()
    admission = platform.admission(provisioner, ORCH_ADMISSION_WORKERS="2", **ADMISSION)
    first, second = metrics_ports(admission, 2)
    assert first != second
    assert scrape(first).names == scrape(second).names


def test_nothing_is_served_unless_told(platform: Platform) -> None:
    provisioner = platform.provisioner()
    connections = psutil.Process(provisioner.process.pid).net_connections()
    assert [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN] == [provisioner.port]


@contextmanager
def unreachable(platform: Platform) -> Iterator[None]:
    """Within the block the registry takes no connections."""
    parts = urlsplit(platform.database_url)
    name = parts.path.lstrip("/")
    with psycopg.connect(parts._replace(path="/postgres").geturl(), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
