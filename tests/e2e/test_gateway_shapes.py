"""What REST callers get when all is well: every method's JSON, field by field, and lists of the greatest length."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1 import fleet_pb2, product_pb2
from september.provisioner.v1 import fleet_service_pb2 as fleet
from september.provisioner.v1 import product_service_pb2 as products
from september.provisioner.v1 import provisioner_service_pb2 as provisioner
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import METHODS
from tests.e2e.gateway_process import Answer, Gateway, placed, running_gateway
from tests.e2e.gateway_services import Context, Services, running_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

STATUS = engine_pb2.Engine.Status
HEALTH = fleet.GetFleetStatusResponse.Health


def at(microseconds: int = 0) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC) + timedelta(microseconds=microseconds))
    return timestamp


PRODUCT = {
    "product_id": "",
    "slug": "shop",
    "policy": {"max_engines": 5, "allowed_images": ["a:*"], "max_keep_awake_s": 0},
    "created_at": "2026-02-03T04:05:06Z",
}
# What a service answers, and the JSON of it. A message with nothing set shows what is never left out.
ANSWERS: list[tuple[str, Message, dict[str, Any]]] = [
    ("CheckHealth", admission_pb.CheckHealthResponse(status="ok"), {"status": "ok"}),
    (
        "ProvisionEngine",
        provisioner.ProvisionEngineResponse(engine_id="e", user_id="u", status=STATUS.running, url="http://e"),
        {"engine_id": "e", "user_id": "u", "status": "running", "url": "http://e", "api_key": ""},
    ),
    (
        "DestroyEngine",
        provisioner.DestroyEngineResponse(status="destroyed", engine_id="e"),
        {"status": "destroyed", "engine_id": "e"},
    ),
    (
        "StartEngine",
        provisioner.StartEngineResponse(status=STATUS.running, url="http://e"),
        {"status": "running", "url": "http://e"},
    ),
    ("StopEngine", provisioner.StopEngineResponse(status=STATUS.stopped), {"status": "stopped"}),
    ("SleepEngine", provisioner.SleepEngineResponse(status=STATUS.sleeping), {"status": "sleeping"}),
    (
        "WakeEngine",
        provisioner.WakeEngineResponse(status=STATUS.running, url="http://e"),
        {"status": "running", "url": "http://e"},
    ),
    ("RotateEngineKey", provisioner.RotateEngineKeyResponse(api_key="sk-sept-2"), {"api_key": "sk-sept-2"}),
    ("ListEngines", fleet.ListEnginesResponse(), {"engines": [], "total": 0}),
    (
        "ListEngines",
        fleet.ListEnginesResponse(
            engines=[
                fleet_pb2.EngineSummary(status=STATUS.failed, created_at=at()),
                fleet_pb2.EngineSummary(
                    engine_id="e",
                    user_id='{"engine":',
                    status=STATUS.running,
                    url="http://e",
                    engine_version="i:1",
                    created_at=at(),
                    last_health_at=at(250_000),
                    product_id="p",
                ),
            ],
            total=2_000_000_000,
            next_page_token="t-_",
        ),
        {
            "engines": [
                {
                    "engine_id": "",
                    "user_id": "",
                    "status": "failed",
                    "url": "",
                    "engine_version": "",
                    "created_at": "2026-02-03T04:05:06Z",
                },
                {
                    "engine_id": "e",
                    "user_id": '{"engine":',
                    "status": "running",
                    "url": "http://e",
                    "engine_version": "i:1",
                    "created_at": "2026-02-03T04:05:06Z",
                    "last_health_at": "2026-02-03T04:05:06.250Z",
                    "product_id": "p",
                },
            ],
            "total": 2_000_000_000,
            "next_page_token": "t-_",
        },
    ),
    (
        "GetFleetStatus",
        fleet.GetFleetStatusResponse(health=HEALTH.ok),
        {"total": 0, "by_status": {}, "health": "ok", "unhealthy_count": 0},
    ),
    (
        "GetFleetStatus",
        fleet.GetFleetStatusResponse(total=5, by_status={"failed": 5}, health=HEALTH.critical, unhealthy_count=5),
        {"total": 5, "by_status": {"failed": 5}, "health": "critical", "unhealthy_count": 5},
    ),
    (
        "GetFleetMetrics",
        fleet.GetFleetMetricsResponse(),
        {
            "provisions_1h": 0,
            "crashes_1h": 0,
            "restarts_1h": 0,
            "avg_boot_ms": 0,
            "total_provisions": 0,
            "total_destroys": 0,
        },
    ),
    (
        "GetFleetMetrics",
        fleet.GetFleetMetricsResponse(
            provisions_1h=1, crashes_1h=2, restarts_1h=3, avg_boot_ms=300.5, total_provisions=4, total_destroys=5
        ),
        {
            "provisions_1h": 1,
            "crashes_1h": 2,
            "restarts_1h": 3,
            "avg_boot_ms": 300.5,
            "total_provisions": 4,
            "total_destroys": 5,
        },
    ),
    (
        "GetEngineHistory",
        fleet.GetEngineHistoryResponse(
            status=STATUS.sleeping,
            since=at(),
            summary="asleep",
            last_admit_at=at(),
            keep_awake_until=at(),
            events=[fleet_pb2.AuditEvent(event_id="7", at=at(), action="sleep", actor="system", outcome="succeeded")],
        ),
        {
            "status": "sleeping",
            "since": "2026-02-03T04:05:06Z",
            "summary": "asleep",
            "last_admit_at": "2026-02-03T04:05:06Z",
            "keep_awake_until": "2026-02-03T04:05:06Z",
            "events": [
                {
                    "event_id": "7",
                    "at": "2026-02-03T04:05:06Z",
                    "action": "sleep",
                    "actor": "system",
                    "outcome": "succeeded",
                    "product_id": "",
                }
            ],
        },
    ),
    (
        "GetEngineHistory",
        fleet.GetEngineHistoryResponse(status=STATUS.stopped, since=at()),
        {"status": "stopped", "since": "2026-02-03T04:05:06Z", "summary": "", "events": []},
    ),
    ("ListAuditEvents", fleet.ListAuditEventsResponse(), {"events": []}),
    (
        "ListAuditEvents",
        fleet.ListAuditEventsResponse(
            events=[
                fleet_pb2.AuditEvent(
                    event_id="8",
                    at=at(),
                    action="start",
                    actor="admin",
                    outcome="failed",
                    product_id="p",
                    engine_id="e",
                    user_id="u",
                    duration_ms=0,
                    error_code="BOOT_TIMEOUT",
                    detail="",
                    count=1,
                )
            ],
            next_page_token="t",
        ),
        {
            "events": [
                {
                    "event_id": "8",
                    "at": "2026-02-03T04:05:06Z",
                    "action": "start",
                    "actor": "admin",
                    "outcome": "failed",
                    "product_id": "p",
                    "engine_id": "e",
                    "user_id": "u",
                    "duration_ms": 0,
                    "error_code": "BOOT_TIMEOUT",
                    "detail": "",
                    "count": 1,
                }
            ],
            "next_page_token": "t",
        },
    ),
    (
        "RegisterProduct",
        products.RegisterProductResponse(product_id="p", slug="shop", platform_api_key="pk-sept-1"),
        {"product_id": "p", "slug": "shop", "platform_api_key": "pk-sept-1"},
    ),
    (
        "UpdatePolicy",
        products.UpdatePolicyResponse(policy=product_pb2.Policy(max_engines=5)),
        {"policy": {"max_engines": 5, "allowed_images": [], "max_keep_awake_s": 0}},
    ),
    (
        "UpdatePolicy",
        products.UpdatePolicyResponse(
            policy=product_pb2.Policy(rate_limit_rpm=1, idle_sleep_after_s=2, max_keep_awake_s=3)
        ),
        {
            "policy": {
                "max_engines": 0,
                "rate_limit_rpm": 1,
                "allowed_images": [],
                "idle_sleep_after_s": 2,
                "max_keep_awake_s": 3,
            }
        },
    ),
    ("ListProducts", products.ListProductsResponse(), {"products": []}),
    (
        "ListProducts",
        products.ListProductsResponse(
            products=[
                product_pb2.Product(
                    slug="shop", policy=product_pb2.Policy(max_engines=5, allowed_images=["a:*"]), created_at=at()
                )
            ],
            next_page_token="t",
        ),
        {"products": [PRODUCT], "next_page_token": "t"},
    ),
    *(
        (
            name,
            answer(
                product=product_pb2.Product(
                    slug="shop",
                    policy=product_pb2.Policy(max_engines=5, allowed_images=["a:*"]),
                    created_at=at(),
                    disabled_at=at(),
                )
            ),
            {"product": {**PRODUCT, "disabled_at": "2026-02-03T04:05:06Z"}},
        )
        for name, answer in {
            "GetProduct": products.GetProductResponse,
            "DisableProduct": products.DisableProductResponse,
            "EnableProduct": products.EnableProductResponse,
        }.items()
    ),
    (
        "RotatePlatformKey",
        products.RotatePlatformKeyResponse(platform_api_key="pk-sept-2"),
        {"platform_api_key": "pk-sept-2"},
    ),
]


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services

    async def answer(self, name: str, message: Message) -> Answer:
        """What REST makes of a service's answer."""

        async def behaviour(context: Context) -> Message:
            return message

        method = METHODS[name]
        key = self.services.on(behaviour)
        # Calls without an id are all the same one.
        self.services.behaviours[method.key(key)] = behaviour
        answer = await self.gateway.rest(*method.rest_call(key))
        self.services.behaviours.clear()
        assert answer.status == 200
        return answer


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with (
        running_services() as services,
        running_gateway(directory, placed(lane, services.address), services.address) as gateway,
    ):
        yield Served(gateway, services)


@pytest.mark.parametrize(("name", "message", "expected"), ANSWERS, ids=[name for name, _, _ in ANSWERS])
async def test_an_answer_has_the_contracts_shape(
    served: Served, name: str, message: Message, expected: dict[str, Any]
) -> None:
    answer = (await served.answer(name, message)).json()
    # As text: the order counts, and whether a number is one.
    assert json.dumps(answer) == json.dumps(expected)


async def test_an_admitted_user_gets_the_engine_and_no_reason(served: Served) -> None:
    engine = engine_pb2.Engine(engine_id="e-1", user_id="ada", status=STATUS.running, api_key="sk-sept-1")
    answer = await served.answer("Admit", admission_pb.AdmitResponse(admitted=True, engine=engine))
    assert answer.json() == {
        "admitted": True,
        "engine": {
            "engine_id": "e-1",
            "user_id": "ada",
            "status": "running",
            "url": "",
            "api_key": "sk-sept-1",
            "engine_version": "",
        },
    }


@pytest.mark.parametrize("reason", [name for name, number in denial_pb2.Denial.Reason.items() if number])
async def test_a_denial_has_a_null_engine_and_its_reason(served: Served, reason: str) -> None:
    denial = admission_pb.AdmitResponse(admitted=False, reason=denial_pb2.Denial.Reason.Value(reason))
    answer = await served.answer("Admit", denial)
    assert answer.body == b'{"admitted":false,"engine":null,"reason":"%s"}' % reason.encode()


@pytest.mark.parametrize("status", [name for name, number in STATUS.items() if number])
async def test_get_answers_with_the_engine_itself(served: Served, status: str) -> None:
    engine = engine_pb2.Engine(
        user_id='{"engine":{}}', status=STATUS.Value(status), created_at=at(), last_health_at=at(1)
    )
    answer = await served.answer("GetEngine", admission_pb.GetEngineResponse(engine=engine))
    assert answer.json() == {
        "engine_id": "",
        "user_id": '{"engine":{}}',
        "status": status,
        "url": "",
        "api_key": "",
        "engine_version": "",
        "created_at": "2026-02-03T04:05:06Z",
        "last_health_at": "2026-02-03T04:05:06.000001Z",
    }


# The longest that 255 characters can be, in UTF-8 and in JSON.
@pytest.mark.parametrize("character", ["😀", "\U000e0001", "<", '"'], ids=["emoji", "tag", "less-than", "quote"])
async def test_a_list_of_a_thousand_engines_with_the_longest_ids_passes(served: Served, character: str) -> None:
    summary = fleet_pb2.EngineSummary(
        engine_id="e" * 36,
        user_id=character * 255,
        status=STATUS.provisioning,
        url="http://engine-" + "e" * 36 + ":8000",
        engine_version="i" * 255,
        created_at=at(1),
        last_health_at=at(1),
        product_id="p" * 36,
    )
    page = fleet.ListEnginesResponse(engines=[summary] * 1000, total=1000, next_page_token="t" * 100)
    answer = await served.answer("ListEngines", page)
    assert [engine["user_id"] for engine in answer.json()["engines"]] == [character * 255] * 1000
    assert answer.json()["next_page_token"] == "t" * 100


async def test_a_list_of_a_thousand_products_with_the_longest_policies_passes(served: Served) -> None:
    policy = product_pb2.Policy(allowed_images=["i" * 255] * 100)
    page = products.ListProductsResponse(products=[product_pb2.Product(slug="s" * 63, policy=policy)] * 1000)
    answer = await served.answer("ListProducts", page)
    assert len(answer.body) > 25_000_000
    assert [len(product["policy"]["allowed_images"]) for product in answer.json()["products"]] == [100] * 1000
