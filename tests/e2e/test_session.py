"""The platform through the real gateway: what a product's developer does on the first day, and its races."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import grpc
import pytest
from yarl import URL

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.engine.v1 import engine_pb2
from services.cli.gateway import Lane
from tests.e2e.gateway_process import Answer, Gateway, Inside, eventually, running_gateway
from tests.harness import Clients, Platform, Product, Service

Shared = tuple[Platform, list[Service]]


class Rest:
    """A product's HTTP client."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, **headers: Any
    ) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer, which is JSON whatever it is."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(
            method, URL(self.url + path, encoded=True), json=body, headers=named
        ) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def admit(self, product: Product, user_id: str, **flags: bool) -> tuple[int, dict[str, Any]]:
        return await self.call("POST", f"/engines/{user_id}/admit", flags, x_platform_key=product.key)


@pytest.fixture(params=Lane)
def lane(request: pytest.FixtureRequest) -> Lane:
    lane: Lane = request.param
    return lane


@asynccontextmanager
async def gateway_of(shared: Shared, lane: Lane, directory: Path, admission: Service) -> AsyncIterator[Gateway]:
    """A gateway with an Admission of its own: behind it, or inside."""
    platform, (provisioner, *_) = shared
    placed: str | Inside = admission.address
    if lane is Lane.FAST:
        environment = {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
        placed = Inside("services.admission.lane:app", environment)
    async with running_gateway(directory, placed, provisioner.address) as gateway:
        yield gateway


@pytest.fixture
async def first(shared: Shared, lane: Lane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with gateway_of(shared, lane, tmp_path_factory.mktemp("first"), shared[1][1]) as gateway:
        yield gateway


@pytest.fixture
async def second(shared: Shared, lane: Lane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with gateway_of(shared, lane, tmp_path_factory.mktemp("second"), shared[1][2]) as gateway:
        yield gateway


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
def rest(session: aiohttp.ClientSession, first: Gateway) -> Rest:
    return Rest(session, f"http://{first.address}")


@pytest.fixture
def operators(session: aiohttp.ClientSession, first: Gateway) -> Rest:
    return Rest(session, f"http://{first.operators}")


@pytest.fixture
def rests(session: aiohttp.ClientSession, rest: Rest, second: Gateway) -> list[Rest]:
    """Two gateways."""
    return [rest, Rest(session, f"http://{second.address}")]


async def test_the_first_day_of_a_product(rest: Rest, operators: Rest, shared: Shared) -> None:
    slug = f"p{uuid4().hex[:20]}"
    status, registered = await operators.call(
        "POST",
        "/products/register",
        {"slug": slug, "policy": {"max_engines": 10, "rate_limit_rpm": 600}},
        x_admin_key=shared[0].admin_key,
    )
    assert status == 200
    assert list(registered) == ["product_id", "slug", "platform_api_key"]
    product = Product(registered["product_id"], slug, registered["platform_api_key"])
    key: dict[str, Any] = {"x_platform_key": product.key}

    assert await rest.call("POST", "/engines/ada/admit", **key) == (
        200,
        {"admitted": False, "engine": None, "reason": "engine_not_found"},
    )
    status, first = await rest.admit(product, "ada", auto_provision=True)
    assert status == 200
    assert first["admitted"] is True
    assert "reason" not in first
    engine = first["engine"]
    assert list(engine) == [
        "engine_id", "user_id", "status", "url", "api_key", "engine_version", "created_at", "last_health_at",
    ]  # fmt: skip
    assert (engine["user_id"], engine["status"]) == ("ada", "running")
    assert engine["created_at"].endswith("Z")
    assert await rest.call("GET", "/engines/ada", **key) == (200, engine)

    async with aiohttp.ClientSession() as session:
        turn = {"message": "hello"}
        execute = f"{engine['url']}/execute"
        async with session.post(execute, json=turn, headers={"X-Engine-Key": engine["api_key"]}) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            assert b"event: done" in await answer.read()
        async with session.post(execute, json=turn, headers={"X-Engine-Key": "sk-sept-other"}) as answer:
            assert answer.status == 401

    assert await rest.admit(product, "ada") == (200, first)
    assert await rest.call("DELETE", "/engines/ada", **key) == (
        200,
        {"status": "destroyed", "engine_id": engine["engine_id"]},
    )
    status, gone = await rest.call("GET", "/engines/ada", **key)
    assert (status, gone["error"]["code"]) == (404, "ENGINE_NOT_FOUND")


async def test_an_engine_is_provisioned_by_request(rest: Rest, clients: Clients) -> None:
    product = await clients.register()
    status, made = await rest.call("POST", "/engines/provision", {"user_id": "a/b"}, x_platform_key=product.key)
    assert status == 200
    assert list(made) == ["engine_id", "user_id", "status", "url", "api_key"]
    assert (made["user_id"], made["status"]) == ("a/b", "running")
    status, got = await rest.call("GET", "/engines/a%2Fb", x_platform_key=product.key)
    assert (status, got["engine_id"], got["user_id"]) == (200, made["engine_id"], "a/b")
    denied = await rest.call("POST", "/engines/provision", {"user_id": "a/b"}, x_platform_key=product.key)
    assert (denied[0], denied[1]["error"]["code"]) == (409, "ENGINE_ALREADY_EXISTS")


async def test_health_needs_no_key(rest: Rest) -> None:
    assert await rest.call("GET", "/health") == (200, {"status": "ok"})


async def test_fifty_first_admits_over_rest_and_grpc_make_one_engine(
    rests: list[Rest], clients: Clients, first: Gateway, second: Gateway, shared: Shared
) -> None:
    product = await clients.register()
    channels = [grpc.aio.insecure_channel(gateway.address) for gateway in (first, second)]
    stubs = [AdmissionServiceStub(channel) for channel in channels]

    async def over_rest(index: int) -> tuple[str, str, str]:
        status, answer = await rests[index % 2].admit(product, "u1", auto_provision=True)
        assert status == 200, answer
        return answer["engine"]["engine_id"], answer["engine"]["api_key"], answer["engine"]["status"]

    async def over_grpc(index: int) -> tuple[str, str, str]:
        request = pb.AdmitRequest(user_id="u1", auto_provision=True)
        answer = await stubs[index % 2].Admit(request, metadata=product.metadata)
        status = engine_pb2.Engine.Status.Name(answer.engine.status)
        return answer.engine.engine_id, answer.engine.api_key, status

    answers = await asyncio.gather(*(over_rest(i) for i in range(25)), *(over_grpc(i) for i in range(25)))
    assert len(set(answers)) == 1
    assert shared[0].query("SELECT count(*) FROM engines WHERE product_id = %s", product.product_id) == [(1,)]
    for channel in channels:
        await channel.close()


async def test_users_over_the_quota_get_429(rests: list[Rest], clients: Clients) -> None:
    product = await clients.register(max_engines=2)
    answers = await asyncio.gather(*(rests[i % 2].admit(product, f"u{i}", auto_provision=True) for i in range(20)))
    outcomes = Counter(status if status == 200 else (status, body["error"]["code"]) for status, body in answers)
    assert outcomes == {200: 2, (429, "QUOTA_EXCEEDED"): 18}


async def test_a_429_says_when_to_come_back(rest: Rest, clients: Clients) -> None:
    product = await clients.register(rate_limit_rpm=1)
    await rest.admit(product, "u1")
    async with aiohttp.ClientSession() as session:
        headers = {"X-Platform-Key": product.key}
        async with session.post(f"{rest.url}/engines/u1/admit", headers=headers) as answer:
            assert answer.status == 429
            retry_after_s = int(answer.headers["Retry-After"])
            assert (await answer.json())["error"]["code"] == "RATE_LIMITED"
    assert 55 <= retry_after_s <= 60


@pytest.mark.parametrize("policy", [{"max_engines": 1, "rate_limit": 60}, {"max_engines": 1.5}, {"max_engines": "1"}])
async def test_a_misspelt_or_mistyped_policy_is_refused_by_name(
    operators: Rest, clients: Clients, shared: Shared, policy: dict[str, Any]
) -> None:
    admin: dict[str, Any] = {"x_admin_key": shared[0].admin_key}
    product = await clients.register()
    named = next(name for name, value in policy.items() if (name, value) != ("max_engines", 1))
    for method, path, body in (
        ("POST", "/products/register", {"slug": f"p{uuid4().hex[:20]}", "policy": policy}),
        ("PUT", f"/products/{product.product_id}/policy", policy),
    ):
        status, answer = await operators.call(method, path, body, **admin)
        assert (status, answer["error"]["code"]) == (400, "INVALID_REQUEST")
        assert answer["error"]["message"].startswith(f"policy.{named}: ")
    status, answer = await operators.call("PUT", f"/products/{product.product_id}/policy", {"max_engines": 7}, **admin)
    assert (status, answer["policy"]["max_engines"]) == (200, 7)
    assert "rate_limit_rpm" not in answer["policy"]


NO_JSON = "the body is not the JSON object that this call takes"


@pytest.mark.parametrize(
    ("deep", "message"),
    [
        ('{"a":' * 10_000 + "1" + "}" * 10_000, NO_JSON),
        ("[" * 32_000 + "]" * 32_000, NO_JSON),
        ("[" * 100_000 + "]" * 100_000, "the body is over 64 KiB"),
    ],
    ids=["objects", "arrays", "arrays over the limit"],
)
async def test_json_as_deep_as_a_body_can_be_is_refused(
    first: Gateway, shared: Shared, clients: Clients, deep: str, message: str
) -> None:
    product = await clients.register()
    admin, key = [("X-Admin-Key", shared[0].admin_key)], [("X-Platform-Key", product.key)]
    for path, body, headers in (
        ("/products/register", f'{{"slug":"deep","policy":{deep}}}', admin),
        ("/engines/u1/admit", f'{{"auto_wake":{deep}}}', key),
        ("/engines/u1/admit", deep, key),
    ):
        answer = await first.rest("POST", path, body.encode(), headers)
        assert answer.own_error() == (400, "INVALID_REQUEST", message)
        assert first.process.returncode is None
        assert (await first.rest("POST", "/engines/u1/admit", b"{}", key)).status == 200


async def test_with_its_services_gone_the_gateway_says_when_to_try_again(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1") as gateway, aiohttp.ClientSession() as session:
        for method, path in (("POST", "/engines/u1/admit"), ("DELETE", "/engines/u1"), ("GET", "/health")):
            async with session.request(method, f"http://{gateway.address}{path}") as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
                assert (await answer.json())["error"]["code"] == "UNAVAILABLE"


async def test_who_was_told_that_a_boot_takes_too_long_and_asks_again_gets_that_engine(
    platform: Platform, connect: Callable[..., Clients], tmp_path: Path
) -> None:
    def impatient(config: str) -> str:
        return re.sub(r"(cluster: admission, timeout:) [1-9][\d.]*s", r"\1 1.5s", config)

    # Which takes 2 s to boot.
    provisioner = platform.provisioner(ORCH_ENGINE_IMAGE="tests.engines.slow_boot")
    admission = platform.admission(provisioner)
    product = await connect(platform, provisioner).register()
    async with running_gateway(tmp_path, admission.address, provisioner.address, impatient) as gateway:

        async def admit() -> Answer:
            key = [("x-platform-key", product.key)]
            return await gateway.rest("POST", "/engines/u1/admit", b'{"auto_provision":true}', key)

        assert (await admit()).error() == (504, "BOOT_TIMEOUT", "the engine was not healthy in time")
        [(engine_id,)] = platform.query("SELECT engine_id FROM engines")

        async def admitted() -> Answer | None:
            answer = await admit()
            return answer if answer.status != 504 else None

        assert (await eventually(admitted)).json()["engine"]["engine_id"] == str(engine_id)
    assert platform.query("SELECT engine_id, kind, outcome FROM operations") == [(engine_id, "provision", "succeeded")]
    assert platform.counts() == dict.fromkeys(platform.counts(), 1)
