"""Operators and products day after day, over REST: the fleet, the life of engines, products, and bad parameters."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from services.provisioner.domain.engine import EngineStatus
from tests.e2e.gateway_process import DEADLINE_S, Gateway, running_gateway
from tests.harness import Clients, Platform, Product, Service

Shared = tuple[Platform, list[Service]]
Headers = list[tuple[str, str]]

SUMMARY = ["engine_id", "user_id", "status", "url", "engine_version", "created_at"]
ALLOWED = ["services.engine", "tests.engines.*"]


class Caller:
    """Someone with a key."""

    def __init__(self, gateway: Gateway, header: str, key: str) -> None:
        self.gateway = gateway
        self.headers: Headers = [(header, key)]

    async def call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        encoded = None if body is None else json.dumps(body).encode()
        answer = await self.gateway.rest(verb, path, encoded, self.headers)
        return answer.status, answer.json()

    async def get(self, path: str) -> Any:
        status, answer = await self.call("GET", path)
        assert status == 200, answer
        return answer

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        status, answer = await self.call("POST", path, body)
        assert status == 200, answer
        return answer

    async def error(self, verb: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        status, answer = await self.call(verb, path, body)
        return status, answer["error"]["code"]


@pytest.fixture
async def gateway(shared: Shared, tmp_path: Path) -> AsyncIterator[Gateway]:
    _, (provisioner, admission, _) = shared
    async with running_gateway(tmp_path, admission.address, provisioner.address) as gateway:
        yield gateway


@pytest.fixture
async def registered(clients: Clients) -> Product:
    return await clients.register(allowed_images=ALLOWED)


@pytest.fixture
def product(gateway: Gateway, registered: Product) -> Caller:
    return Caller(gateway, "x-platform-key", registered.key)


@pytest.fixture
def admin(gateway: Gateway, shared: Shared) -> Caller:
    return Caller(gateway, "x-admin-key", shared[0].admin_key)


def add_engines(platform: Platform, product: Product, *user_ids: str, status: str = "running") -> None:
    """Rows alone, of a node that nobody runs, so that no loop looks for their instances."""
    platform.query(
        "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
        " SELECT gen_random_uuid(), %s, user_id, %s, 'engine:1', 'elsewhere', 'http://127.0.0.1:1', ''"
        " FROM unnest(%s::text[]) AS user_id",
        UUID(product.product_id),
        status,
        list(user_ids),
    )


async def next_line(lines: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(lines)


async def test_the_life_of_an_engine(product: Caller, registered: Product) -> None:
    made = await product.post("/engines/provision", {"user_id": "a/b"})
    path = "/engines/a%2Fb"
    assert list(made) == ["engine_id", "user_id", "status", "url", "api_key"]

    assert await product.error("POST", f"{path}/start") == (409, "ENGINE_ALREADY_RUNNING")
    assert await product.error("POST", f"{path}/wake") == (409, "ENGINE_ALREADY_RUNNING")
    assert await product.post(f"{path}/stop") == {"status": "stopped"}
    assert await product.error("POST", f"{path}/stop") == (409, "ENGINE_NOT_RUNNING")
    assert await product.error("POST", f"{path}/sleep") == (409, "ENGINE_NOT_RUNNING")
    assert await product.error("POST", f"{path}/rotate-key") == (409, "ENGINE_NOT_RUNNING")
    assert await product.post(f"{path}/start", {}) == {"status": "running", "url": made["url"]}
    assert await product.post(f"{path}/sleep") == {"status": "sleeping"}
    assert await product.post(f"{path}/wake") == {"status": "running", "url": made["url"]}

    rotated = await product.post(f"{path}/rotate-key")
    assert list(rotated) == ["api_key"]
    assert rotated["api_key"] != made["api_key"]
    assert (await product.post(f"{path}/admit"))["engine"]["api_key"] == rotated["api_key"]

    history = await product.get(f"{path}/history")
    # The admit may not have been noted yet.
    assert [name for name in history if name != "last_admit_at"] == ["status", "since", "summary", "events"]
    assert history["status"] == "running"
    done = [event["action"] for event in history["events"] if event["outcome"] == "succeeded"]
    assert done == ["rotate_key", "wake", "sleep", "start", "stop", "provision"]
    first = history["events"][-1]
    assert list(first) == [
        "event_id", "at", "action", "actor", "outcome", "product_id", "engine_id", "user_id",
    ]  # fmt: skip
    assert (first["actor"], first["outcome"]) == (f"product:{registered.slug}", "requested")
    assert all(isinstance(event.get("duration_ms", 0), int) for event in history["events"])
    assert len((await product.get(f"{path}/history?limit=3"))["events"]) == 3

    assert await product.call("DELETE", path) == (200, {"status": "destroyed", "engine_id": made["engine_id"]})
    for verb, action in [("GET", ""), ("GET", "/history"), ("GET", "/watch"), ("POST", "/start"), ("POST", "/sleep")]:
        assert await product.error(verb, path + action) == (404, "ENGINE_NOT_FOUND")


async def test_a_list_of_engines_by_pages_and_status(
    product: Caller, admin: Caller, registered: Product, shared: Shared
) -> None:
    add_engines(shared[0], registered, *(f"r{i}" for i in range(5)))
    add_engines(shared[0], registered, "f0", "f1", status="failed")

    whole = await product.get("/engines")
    assert list(whole) == ["engines", "total"]
    assert whole["total"] == 7
    assert {tuple(engine) for engine in whole["engines"]} == {tuple(SUMMARY)}
    users = [engine["user_id"] for engine in whole["engines"]]

    seen: list[str] = []
    path = "/engines?limit=3"
    while True:
        page = await product.get(path)
        seen += [engine["user_id"] for engine in page["engines"]]
        assert page["total"] == 7
        if "next_page_token" not in page:
            break
        path = f"/engines?limit=3&page_token={page['next_page_token']}"
    assert seen == users

    assert [e["user_id"] for e in (await product.get("/engines?limit=2&offset=4"))["engines"]] == users[4:6]
    failed = await product.get("/engines?status=failed")
    assert ([engine["status"] for engine in failed["engines"]], failed["total"]) == (["failed"] * 2, 2)
    assert await product.get("/engines?status=stopped") == {"engines": [], "total": 0}

    everybody: list[Any] = []
    token = ""
    while not everybody or token:
        page = await admin.get(f"/engines?limit=1000{token and f'&page_token={token}'}")
        everybody += page["engines"]
        token = page.get("next_page_token", "")
    assert {tuple(engine)[-1] for engine in everybody} == {"product_id"}
    assert sum(engine["product_id"] == registered.product_id for engine in everybody) == 7


async def test_status_and_metrics(product: Caller, admin: Caller, registered: Product, shared: Shared) -> None:
    nothing = {str(status): 0 for status in EngineStatus}
    status = await product.get("/status")
    assert list(status) == ["total", "by_status", "health", "unhealthy_count"]
    assert status == {"total": 0, "by_status": nothing, "health": "ok", "unhealthy_count": 0}
    add_engines(shared[0], registered, "u1", "u2", "u3", "u4")
    add_engines(shared[0], registered, "u5", status="failed")
    assert await product.get("/status") == {
        "total": 5,
        "by_status": {**nothing, "running": 4, "failed": 1},
        "health": "degraded",
        "unhealthy_count": 1,
    }
    add_engines(shared[0], registered, "u6", status="failed")
    assert (await product.get("/status"))["health"] == "critical"
    assert (await admin.get("/status"))["total"] >= 6

    metrics = await product.get("/metrics")
    assert list(metrics) == [
        "provisions_1h", "crashes_1h", "restarts_1h", "avg_boot_ms", "total_provisions", "total_destroys",
    ]  # fmt: skip
    assert set(metrics.values()) == {0}
    await product.post("/engines/provision", {"user_id": "real"})
    await product.call("DELETE", "/engines/real")
    metrics = await product.get("/metrics")
    assert metrics.pop("avg_boot_ms") > 0
    assert metrics == {
        "provisions_1h": 1, "crashes_1h": 0, "restarts_1h": 0, "total_provisions": 1, "total_destroys": 1,
    }  # fmt: skip


async def test_the_audit_log_of_a_product_and_of_all(
    product: Caller, admin: Caller, registered: Product, clients: Clients
) -> None:
    other = await clients.register()
    await product.post("/engines/provision", {"user_id": "a/b"})
    await product.post("/engines/a%2Fb/stop")

    log = await product.get("/audit")
    assert list(log) == ["events"]
    happened = [(event["action"], event["outcome"]) for event in log["events"]]
    assert happened == [
        ("stop", "succeeded"),
        ("stop", "requested"),
        ("provision", "succeeded"),
        ("provision", "requested"),
        ("policy_register", "succeeded"),
    ]
    assert {event["product_id"] for event in log["events"]} == {registered.product_id}
    first = await product.get("/audit?limit=2")
    assert first["events"] == log["events"][:2]
    rest = await product.get(f"/audit?page_token={first['next_page_token']}")
    assert rest == {"events": log["events"][2:]}
    assert await product.get("/audit?action=stop&user_id=a%2Fb") == {"events": log["events"][:2]}
    assert await product.get("/audit?user_id=nobody") == {"events": []}

    assert await admin.get(f"/audit?product_id={registered.product_id}") == log
    (only,) = (await admin.get(f"/audit?product_id={other.product_id}"))["events"]
    assert (only["action"], only["actor"]) == ("policy_register", "admin")
    latest = await admin.get("/audit?limit=1000")
    assert {registered.product_id, other.product_id} <= {event["product_id"] for event in latest["events"]}


async def test_products_are_administered(admin: Caller, gateway: Gateway) -> None:
    slug = f"p{uuid4().hex[:20]}"
    made = await admin.post("/products/register", {"slug": slug, "policy": {"max_engines": 3}})
    assert list(made) == ["product_id", "slug", "platform_api_key"]
    path = f"/products/{made['product_id']}"

    found = (await admin.get(path))["product"]
    assert list(found) == ["product_id", "slug", "policy", "created_at"]
    assert found["policy"] == {"max_engines": 3, "allowed_images": [], "max_keep_awake_s": 3600}
    policy = {"max_engines": 4, "rate_limit_rpm": 60, "allowed_images": ["x:*"], "max_keep_awake_s": 0}
    assert await admin.call("PUT", f"{path}/policy", policy) == (200, {"policy": policy})
    assert (await admin.get(path))["product"] == {**found, "policy": policy}

    listed: list[dict[str, Any]] = []
    page = {"next_page_token": ""}
    while "next_page_token" in page:
        page = await admin.get(f"/products?limit=1000&page_token={page['next_page_token']}")
        listed += page["products"]
    assert {**found, "policy": policy} in listed

    def with_key(key: str) -> Caller:
        return Caller(gateway, "x-platform-key", key)

    old = with_key(made["platform_api_key"])
    rotated = await admin.post(f"{path}/rotate-key", {"grace_s": 60})
    assert list(rotated) == ["platform_api_key"]
    new = with_key(rotated["platform_api_key"])
    for caller in (old, new):
        assert (await caller.get("/status"))["total"] == 0
    newest = with_key((await admin.post(f"{path}/rotate-key"))["platform_api_key"])
    for caller in (old, new):
        assert await caller.error("GET", "/status") == (401, "INVALID_PLATFORM_KEY")

    disabled = await admin.post(f"{path}/disable")
    assert list(disabled) == ["product"]
    assert list(disabled["product"]) == [*found, "disabled_at"]
    assert await newest.error("GET", "/status") == (401, "INVALID_PLATFORM_KEY")
    assert await admin.post(f"{path}/enable") == {"product": {**found, "policy": policy}}
    assert (await newest.get("/status"))["total"] == 0

    nobody = f"/products/{uuid4()}"
    for verb, action in [("GET", ""), ("POST", "/rotate-key"), ("POST", "/disable"), ("POST", "/enable")]:
        assert await admin.error(verb, nobody + action) == (404, "PRODUCT_NOT_FOUND")


# Verb and path, and the code without a key or with a wrong one.
NEED_A_KEY = [
    ("GET", "/engines", "INVALID_PLATFORM_KEY"),
    ("GET", "/status", "INVALID_PLATFORM_KEY"),
    ("GET", "/metrics", "INVALID_PLATFORM_KEY"),
    ("GET", "/audit", "INVALID_PLATFORM_KEY"),
    ("GET", "/engines/u1/history", "INVALID_PLATFORM_KEY"),
    ("GET", "/engines/u1/watch", "INVALID_PLATFORM_KEY"),
    ("POST", "/engines/u1/start", "INVALID_PLATFORM_KEY"),
    ("POST", "/engines/u1/stop", "INVALID_PLATFORM_KEY"),
    ("POST", "/engines/u1/sleep", "INVALID_PLATFORM_KEY"),
    ("POST", "/engines/u1/wake", "INVALID_PLATFORM_KEY"),
    ("POST", "/engines/u1/rotate-key", "INVALID_PLATFORM_KEY"),
    ("GET", "/products", "INVALID_ADMIN_KEY"),
    ("GET", "/products/p", "INVALID_ADMIN_KEY"),
    ("POST", "/products/p/rotate-key", "INVALID_ADMIN_KEY"),
    ("POST", "/products/p/disable", "INVALID_ADMIN_KEY"),
    ("POST", "/products/p/enable", "INVALID_ADMIN_KEY"),
]


@pytest.mark.parametrize(("verb", "path", "code"), NEED_A_KEY)
async def test_a_wrong_key_is_answered_as_a_missing_one(gateway: Gateway, verb: str, path: str, code: str) -> None:
    header = "x-admin-key" if code == "INVALID_ADMIN_KEY" else "x-platform-key"
    missing = await gateway.rest(verb, path)
    wrong = await gateway.rest(verb, path, headers=[(header, "pk-sept-" + "A" * 43)])
    assert missing.error()[:2] == (401, code)
    assert wrong.body == missing.body


async def test_a_products_key_is_no_operators(product: Caller, admin: Caller) -> None:
    assert await product.error("GET", "/products") == (401, "INVALID_ADMIN_KEY")
    assert await admin.error("GET", "/engines/u1/history") == (404, "ROUTE_NOT_FOUND")


# Who asks, for what, and the parameter that the refusal begins with.
BAD_PARAMETERS = [
    ("product", "/engines?status=asleep", "status"),
    ("product", "/engines?status=RUNNING", "status"),
    ("product", "/engines?status=unspecified", "status"),
    ("product", "/engines?status=3", "status"),
    ("admin", "/engines?status=running,failed", "status"),
    ("product", "/engines?limit=0", "limit"),
    ("product", "/engines?limit=-1", "limit"),
    ("product", "/engines?limit=1001", "limit"),
    ("admin", "/engines?limit=2147483647", "limit"),
    ("product", "/engines?limit=99999999999", "limit"),
    ("product", "/engines?limit=abc", "limit"),
    ("product", "/engines?limit=1e9", "limit"),
    ("product", "/engines?limit=1&limit=2", "limit"),
    ("product", "/engines?offset=-1", "offset"),
    ("product", "/engines?offset=x", "offset"),
    ("product", "/engines?page_token=nonsense", "page_token"),
    ("product", "/engines?page_token=%F0%9F%98%80", "page_token"),
    ("product", "/engines?size=10", "unknown query parameter size"),
    ("product", "/engines/u1/history?limit=1001", "limit"),
    ("product", "/engines/u1/history?limit=-1", "limit"),
    ("product", "/engines/u1/history?user_id=other", "unknown query parameter user_id"),
    ("product", "/audit?action=nonsense", "action"),
    ("product", "/audit?limit=1001", "limit"),
    ("product", "/audit?limit=0", "limit"),
    ("product", "/audit?page_token=-", "page_token"),
    ("product", "/audit?user_id=%0A", "user_id"),
    ("product", "/audit?offset=1", "unknown query parameter offset"),
    ("admin", "/audit?user_id=u1", "user_id"),
    ("admin", "/audit?product_id=x", "product_id"),
    ("admin", "/products?limit=1001", "limit"),
    ("admin", "/products?limit=-1", "limit"),
    ("admin", "/products?page_token=x", "page_token"),
    ("admin", "/products?slug=x", "unknown query parameter slug"),
    ("admin", "/products/x", "product_id"),
    ("product", "/engines/%0A/history", "user_id"),
    ("product", "/engines/%0A/watch", "user_id"),
    ("product", "/engines//watch", "user_id"),
]


@pytest.mark.parametrize(("who", "target", "named"), BAD_PARAMETERS, ids=[target for _, target, _ in BAD_PARAMETERS])
async def test_a_bad_parameter_is_refused_by_name(
    product: Caller, admin: Caller, who: str, target: str, named: str
) -> None:
    caller = product if who == "product" else admin
    status, answer = await caller.call("GET", target)
    assert (status, answer["error"]["code"]) == (400, "INVALID_REQUEST")
    assert answer["error"]["message"].startswith(named)


@asynccontextmanager
async def watching(product: Caller, user_id: str) -> AsyncIterator[AsyncIterator[Any]]:
    """The lines of a watch, as soon as there is an engine and someone to tell of it."""
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                path = f"/engines/{user_id}/watch"
                answer = await stack.enter_async_context(product.gateway.lines(path, product.headers))
                if answer.status == 200:
                    break
                assert answer.status in (404, 503)
                await stack.aclose()
        yield aiter(answer)


async def test_a_boot_is_watched_as_it_happens(product: Caller) -> None:
    body = {"user_id": "u1", "engine_version": "tests.engines.slow_boot"}
    boot = asyncio.create_task(product.post("/engines/provision", body))
    async with watching(product, "u1") as lines:
        seen = [await next_line(lines)]
        # It has come while the engine boots.
        assert not boot.done()
        while seen[-1]["status"] != "running" or seen[-1]["operation"]:
            seen.append(await next_line(lines))
        assert (await boot)["status"] == "running"
        await product.call("DELETE", "/engines/u1")
        # The engine is gone, and so the answer is whole.
        seen += [line async for line in lines]
    assert {tuple(line) for line in seen} == {("status", "operation", "step", "at")}
    assert seen[0]["status"] == "provisioning"
    assert {"provision"} == {line["operation"] for line in seen if line["status"] == "provisioning"}
    probes = [line["step"] for line in seen if line["step"].startswith("probing ")]
    assert len(probes) > 1
    assert probes == sorted(probes, key=lambda step: int(step.split()[1]))
    assert seen[-1]["status"] in ("running", "destroying")


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_watch_breaks_off_with_its_provisioner_and_is_taken_up_by_the_next(
    platform: Platform, connect: Callable[..., Clients], tmp_path: Path, orderly: bool
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner)
    registered = await clients.register()
    async with running_gateway(tmp_path, "127.0.0.1:1", provisioner.address) as gateway:
        product = Caller(gateway, "x-platform-key", registered.key)
        await product.post("/engines/provision", {"user_id": "u1"})
        async with watching(product, "u1") as lines:
            before = await next_line(lines)
            await asyncio.to_thread(provisioner.terminate if orderly else provisioner.kill)
            with pytest.raises(asyncio.IncompleteReadError):
                await next_line(lines)
        assert await product.error("GET", "/engines/u1/watch") == (503, "UNAVAILABLE")
        await asyncio.to_thread(platform.provisioner, ORCH_PROVISIONER_LISTEN=provisioner.address)
        async with watching(product, "u1") as lines:
            after = await next_line(lines)
    assert (before["status"], after["status"]) == ("running", "running")
