"""Many engines at a glance, what happened to them, and who may see which."""

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from september.engine.v1 import engine_pb2
from september.provisioner.v1 import fleet_pb2
from september.provisioner.v1 import fleet_service_pb2 as pb
from september.provisioner.v1 import provisioner_service_pb2 as provisioner_pb
from services.provisioner.domain.audit import AuditAction
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.paging import page_token
from tests.harness import Clients, Platform, Product, Service
from tests.integration.fleet_rows import add_engines, add_event, refused

Shared = tuple[Platform, list[Service]]
Metadata = tuple[tuple[str, str], ...]


async def all_pages(
    clients: Clients, metadata: Metadata, between: Callable[[], None] = lambda: None, **request: Any
) -> list[fleet_pb2.EngineSummary]:
    """The engines of every page; `between` happens after each."""
    engines: list[fleet_pb2.EngineSummary] = []
    token = ""
    while True:
        page = await clients.fleet.ListEngines(pb.ListEnginesRequest(page_token=token, **request), metadata=metadata)
        engines += page.engines
        if not page.HasField("next_page_token"):
            return engines
        token = page.next_page_token
        between()


async def test_pages_hold_every_engine_once_while_others_come_and_change(clients: Clients, shared: Shared) -> None:
    platform = shared[0]
    product = await clients.register(max_engines=10_000)
    first = [f"u{i}" for i in range(2500)]
    add_engines(platform, product, *first)
    newcomers = iter(range(100))

    def between() -> None:
        add_engines(platform, product, *(f"new-{next(newcomers)}" for _ in range(3)))
        platform.query(
            "UPDATE engines SET status = 'sleeping' WHERE product_id = %s AND user_id IN ('u7', 'u2400')",
            UUID(product.product_id),
        )

    users = [e.user_id for e in await all_pages(clients, product.metadata, between, limit=200)]
    assert len(users) == len(set(users))
    assert [user for user in users if not user.startswith("new-")] == sorted(first, key=users.index)
    assert set(first) <= set(users)
    assert len(users) > len(first)
    rows = platform.query(
        "SELECT user_id FROM engines WHERE product_id = %s ORDER BY created_at, engine_id", UUID(product.product_id)
    )
    assert users == [user for (user,) in rows]


async def test_a_list_is_narrowed_by_status_and_begins_at_an_offset(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    add_engines(shared[0], product, *(f"r{i}" for i in range(7)))
    add_engines(shared[0], product, *(f"f{i}" for i in range(3)), status="failed")

    async def page(**request: Any) -> tuple[list[str], int, bool]:
        answer = await clients.fleet.ListEngines(pb.ListEnginesRequest(**request), metadata=product.metadata)
        return [e.user_id for e in answer.engines], answer.total, answer.HasField("next_page_token")

    everybody = (await page())[0]
    assert sorted(everybody) == sorted([f"r{i}" for i in range(7)] + [f"f{i}" for i in range(3)])
    assert await page() == (everybody, 10, False)
    assert await page(limit=4) == (everybody[:4], 10, True)
    assert await page(limit=4, offset=6) == (everybody[6:], 10, False)
    assert await page(offset=10) == ([], 10, False)
    failed = [user for user in everybody if user.startswith("f")]
    assert await page(status="failed") == (failed, 3, False)
    assert await page(status="failed", limit=1, offset=1) == (failed[1:2], 3, True)
    assert await page(status="stopped") == ([], 0, False)
    pages = await all_pages(clients, product.metadata, status="failed", limit=1)
    assert [engine.user_id for engine in pages] == failed


async def test_a_product_sees_its_own_and_operators_see_whose_is_what(clients: Clients, shared: Shared) -> None:
    ours, theirs = await clients.register(), await clients.register()
    add_engines(shared[0], ours, "u1")
    add_engines(shared[0], theirs, "u1", "u2")
    seen = await clients.fleet.ListEngines(pb.ListEnginesRequest(), metadata=ours.metadata)
    assert (len(seen.engines), seen.total) == (1, 1)
    engine = seen.engines[0]
    assert (engine.user_id, engine.status, engine.engine_version) == (
        "u1",
        engine_pb2.Engine.Status.running,
        "engine:1",
    )
    assert engine.url == "http://127.0.0.1:1"
    assert engine.HasField("created_at")
    assert not engine.HasField("last_health_at")
    assert not engine.HasField("product_id")

    everything = await all_pages(clients, clients.admin, limit=1000)
    whose = [(e.product_id, e.user_id) for e in everything if e.product_id in (ours.product_id, theirs.product_id)]
    assert sorted(whose) == sorted([(ours.product_id, "u1"), (theirs.product_id, "u1"), (theirs.product_id, "u2")])
    rows = shared[0].query("SELECT count(*) FROM engines")[0][0]
    page = await clients.fleet.ListEngines(pb.ListEnginesRequest(limit=1), metadata=clients.admin)
    status = await clients.fleet.GetFleetStatus(pb.GetFleetStatusRequest(), metadata=clients.admin)
    assert len(everything) == page.total == status.total == rows


async def test_status_counts_every_status_and_says_how_the_fleet_is(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    Health = pb.GetFleetStatusResponse.Health  # noqa: N806 - a class of the generated code

    async def status() -> tuple[dict[str, int], int, int, int]:
        answer = await clients.fleet.GetFleetStatus(pb.GetFleetStatusRequest(), metadata=product.metadata)
        return dict(answer.by_status), answer.total, answer.health, answer.unhealthy_count

    none = {str(name): 0 for name in EngineStatus}
    assert await status() == (none, 0, Health.ok, 0)
    add_engines(shared[0], product, "u1", "u2", "u3")
    add_engines(shared[0], product, "u4", status="sleeping")
    assert await status() == ({**none, "running": 3, "sleeping": 1}, 4, Health.ok, 0)
    add_engines(shared[0], product, "u5", status="failed")
    assert await status() == ({**none, "running": 3, "sleeping": 1, "failed": 1}, 5, Health.degraded, 1)
    shared[0].query(
        "UPDATE engines SET status = 'failed' WHERE product_id = %s AND user_id = 'u1'", UUID(product.product_id)
    )
    assert await status() == ({**none, "running": 2, "sleeping": 1, "failed": 2}, 5, Health.critical, 2)


async def test_metrics_tell_of_the_past_hour_and_of_all_time(clients: Clients, shared: Shared) -> None:
    product, other = await clients.register(), await clients.register()

    async def metrics(metadata: Metadata) -> pb.GetFleetMetricsResponse:
        return await clients.fleet.GetFleetMetrics(pb.GetFleetMetricsRequest(), metadata=metadata)

    before = await metrics(clients.admin)
    assert await metrics(product.metadata) == pb.GetFleetMetricsResponse()
    past: list[tuple[Product, str, dict[str, Any]]] = [
        (product, "provision", {"duration_ms": 200}),
        (product, "provision", {"duration_ms": 401, "minutes_ago": 59}),
        (product, "provision", {"duration_ms": 9_000, "minutes_ago": 61}),
        (product, "health_failed", {}),
        (product, "health_failed", {"minutes_ago": 61}),
        (product, "auto_restart_start", {}),
        (product, "auto_restart_start", {"minutes_ago": 30}),
        (product, "destroy", {}),
        (product, "start", {"duration_ms": 77}),
        (other, "provision", {"duration_ms": 1_000}),
    ]
    for whose, action, columns in past:
        add_event(shared[0], whose, action, **columns)
    for outcome in ("requested", "failed", "cancelled"):
        add_event(shared[0], product, "provision", outcome, duration_ms=60_000)
        add_event(shared[0], product, "destroy", outcome)
    assert await metrics(product.metadata) == pb.GetFleetMetricsResponse(
        provisions_1h=2, crashes_1h=1, restarts_1h=2, avg_boot_ms=300.5, total_provisions=3, total_destroys=1
    )
    after = await metrics(clients.admin)
    assert after.provisions_1h - before.provisions_1h == 3
    assert after.total_provisions - before.total_provisions == 4


async def test_counts_are_those_of_the_rows_after_many_lives_at_once(
    platform: Platform, connect: Callable[..., Clients]
) -> None:
    clients = connect(platform, platform.provisioner())
    products = [await clients.register() for _ in range(2)]

    async def live(product: Product, user_id: str, *, destroyed: bool) -> None:
        await clients.provisioner.ProvisionEngine(
            provisioner_pb.ProvisionEngineRequest(user_id=user_id), metadata=product.metadata
        )
        if destroyed:
            await clients.provisioner.DestroyEngine(
                provisioner_pb.DestroyEngineRequest(user_id=user_id), metadata=product.metadata
            )

    await asyncio.gather(*(live(product, f"u{i}", destroyed=i % 2 == 0) for product in products for i in range(8)))
    for metadata, lives in ((products[0].metadata, 8), (clients.admin, 16)):
        status = await clients.fleet.GetFleetStatus(pb.GetFleetStatusRequest(), metadata=metadata)
        metrics = await clients.fleet.GetFleetMetrics(pb.GetFleetMetricsRequest(), metadata=metadata)
        page = await clients.fleet.ListEngines(pb.ListEnginesRequest(), metadata=metadata)
        assert status.by_status["running"] == status.total == page.total == len(page.engines) == lives // 2
        assert (metrics.provisions_1h, metrics.total_provisions, metrics.total_destroys) == (lives, lives, lives // 2)
        assert 0 < metrics.avg_boot_ms < 60_000
    rows = platform.query("SELECT product_id, 'engines:' || status, count(*) FROM engines GROUP BY 1, 2 ORDER BY 1, 2")
    assert rows == platform.query(
        "SELECT product_id, name, sum(n)::bigint FROM counts WHERE name LIKE 'engines:%%'"
        " GROUP BY 1, 2 HAVING sum(n) <> 0 ORDER BY 1, 2"
    )


STATUSES = "must be one of provisioning, running, sleeping, stopped, failed, destroying"
TOKEN = "must be the next_page_token of another page"


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("ListEngines", pb.ListEnginesRequest(status="asleep"), f"status: {STATUSES}"),
        ("ListEngines", pb.ListEnginesRequest(status="RUNNING"), f"status: {STATUSES}"),
        ("ListEngines", pb.ListEnginesRequest(limit=0), "limit: must be a whole number from 1 to 1000"),
        ("ListEngines", pb.ListEnginesRequest(limit=1001), "limit: must be a whole number from 1 to 1000"),
        ("ListEngines", pb.ListEnginesRequest(limit=-1), "limit: must be a whole number from 1 to 1000"),
        ("ListEngines", pb.ListEnginesRequest(offset=-1), "offset: must not be negative"),
        ("ListEngines", pb.ListEnginesRequest(page_token="x"), f"page_token: {TOKEN}"),
        ("ListEngines", pb.ListEnginesRequest(page_token="eA"), f"page_token: {TOKEN}"),
        ("ListEngines", pb.ListEnginesRequest(page_token="ü"), f"page_token: {TOKEN}"),
        (
            "ListEngines",
            pb.ListEnginesRequest(
                offset=1,
                page_token="MjAzMC0wMS0wMlQwMzowNDowNSswMDowMCAwMDAwMDAwMC0wMDAwLTAwMDAtMDAwMC0wMDAwMDAwMDAwMDA",
            ),
            "offset: not together with a page_token",
        ),
        *(
            ("ListEngines", pb.ListEnginesRequest(page_token=page_token(f"{at} {UUID(int=0)}")), f"page_token: {TOKEN}")
            for at in ("2030-01-02T03:04:05", "2030-01-02T03:04:05+23:59", "0001-01-01T00:00:00+00:00:01")
        ),
        ("GetEngineHistory", pb.GetEngineHistoryRequest(), "user_id: must be 1 to 255 printable characters"),
        ("GetEngineHistory", pb.GetEngineHistoryRequest(user_id=".."), "user_id: must not be '.' or '..'"),
        ("GetEngineHistory", pb.GetEngineHistoryRequest(user_id="u", limit=0), "limit: must be a whole number from 1"),
        (
            "ListAuditEvents",
            pb.ListAuditEventsRequest(action="admit"),
            f"action: must be one of {', '.join(AuditAction)}",
        ),
        ("ListAuditEvents", pb.ListAuditEventsRequest(user_id="\n"), "user_id: must be 1 to 255 printable characters"),
        ("ListAuditEvents", pb.ListAuditEventsRequest(limit=1001), "limit: must be a whole number from 1 to 1000"),
        ("ListAuditEvents", pb.ListAuditEventsRequest(page_token="LTE"), f"page_token: {TOKEN}"),
        ("ListAuditEvents", pb.ListAuditEventsRequest(page_token="OTIyMzM3MjAzNjg1NDc3NTgwOA"), f"page_token: {TOKEN}"),
        ("ListAuditEvents", pb.ListAuditEventsRequest(product_id=str(uuid4())), "product_id: for operators only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_call_is_refused_by_name(clients: Clients, method: str, request_: Any, message: str) -> None:
    product = await clients.register()
    answer = await refused(getattr(clients.fleet, method)(request_, metadata=product.metadata))
    assert answer.startswith(f"INVALID_REQUEST: {message}")


async def test_an_admin_key_beside_a_platform_key_has_to_be_right(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    wrong = (("x-admin-key", "wrong"),)
    request = pb.GetFleetStatusRequest()
    missing = await refused(clients.fleet.GetFleetStatus(request))
    assert missing.startswith("INVALID_PLATFORM_KEY: ")
    for metadata in (
        wrong,
        wrong + product.metadata,
        product.metadata + wrong,
        clients.admin + wrong,
        product.metadata * 2,
    ):
        assert await refused(clients.fleet.GetFleetStatus(request, metadata=metadata)) == missing
    add_engines(shared[0], await clients.register(), "u1")
    for metadata in (clients.admin, clients.admin + product.metadata):
        page = await clients.fleet.ListEngines(pb.ListEnginesRequest(limit=1), metadata=metadata)
        assert page.engines[0].HasField("product_id")
    # The history of one engine is a product's affair: user ids are theirs.
    history = pb.GetEngineHistoryRequest(user_id="u1")
    assert await refused(clients.fleet.GetEngineHistory(history, metadata=clients.admin)) == missing
