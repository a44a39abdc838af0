"""The gateway as an edge: hostile headers, malformed requests, slow callers, and services that fail."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import BOOTS, METHODS, UNARY
from tests.e2e.gateway_process import Gateway, eventually, placed, running_gateway
from tests.e2e.gateway_services import Behaviour, Context, Services, failing, gateway_and_services, running_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNAVAILABLE = (503, "UNAVAILABLE", "the service is not available, try again")
MALFORMED = [
    b"NONSENSE\r\n\r\n",
    b"BREW /engines/a HTTP/1.1\r\nhost: a\r\n\r\n",
    b"get /health HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.0\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/9.9\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET health HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /engines/a b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /engines/\xff HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /engines/a#b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nbad name: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: a\x01b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx_platform_key: b\r\n\r\n",
    b"POST /engines/a/admit HTTP/1.1\r\nhost: a\r\ncontent-length: two\r\n\r\n{}",
    b"POST /engines/a/admit HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    b"POST /engines/a/admit HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /engines/a/admit HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n{}",
    b"POST /engines/a/admit HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
# What they would do if the gateway believed them, with a service that is slow and then fails.
ENVOY_HEADERS = {
    "x-envoy-retry-on": "5xx,retriable-4xx,gateway-error,reset",
    "x-envoy-retry-grpc-on": "cancelled,deadline-exceeded,internal,resource-exhausted,unavailable",
    "x-envoy-max-retries": "5",
    "x-envoy-retriable-status-codes": "503",
    "x-envoy-retriable-header-names": "content-type",
    "x-envoy-hedge-on-per-try-timeout": "true",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-upstream-rq-per-try-timeout-ms": "1",
    "x-envoy-expected-rq-timeout-ms": "1",
    "x-envoy-upstream-rq-timeout-alt-response": "1",
    "x-envoy-upstream-alt-stat-name": "planted",
    "x-envoy-decorator-operation": "planted",
    "x-envoy-force-trace": "true",
    "x-envoy-internal": "true",
    "x-envoy-ip-tags": "planted",
    "x-envoy-original-path": "/engines/planted?x",
    "x-envoy-original-method": "DELETE",
    "x-envoy-external-address": "10.0.0.1",
    "x-forwarded-for": "10.0.0.1",
    "x-forwarded-proto": "https",
}


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with gateway_and_services(lane, directory) as (gateway, services):
        yield Served(gateway, services)


def never(started: asyncio.Event) -> Behaviour:
    """Never answers."""

    async def behaviour(context: Context) -> Message:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    return behaviour


@pytest.mark.parametrize("request_", MALFORMED, ids=[repr(request[:60]) for request in MALFORMED])
async def test_what_is_not_http_is_an_invalid_request(served: Served, request_: bytes) -> None:
    answer = await served.gateway.raw(request_)
    assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


async def test_headers_over_the_limits_are_an_invalid_request(served: Served) -> None:
    for headers in ([("x", "x" * 17_000)], [(f"x-{i}", "1") for i in range(70)]):
        answer = await served.gateway.rest("GET", "/health", headers=headers)
        assert answer.own_error() == (400, "INVALID_REQUEST", "the headers are over 16 KiB or more than 64")
    answer = await served.gateway.rest("GET", "/engines/" + "a" * 17_000)
    assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


async def test_an_upgrade_is_refused_at_once(served: Served) -> None:
    headers = [("connection", "upgrade"), ("upgrade", "websocket")]
    answer = await served.gateway.rest("GET", "/health", headers=headers)
    assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


async def test_an_upgrade_to_http2_is_ignored(served: Served) -> None:
    headers = [("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABkAAQAAP__")]
    assert (await served.gateway.rest("GET", "/health", headers=headers)).json() == {"status": "ok"}


async def test_a_tunnel_is_refused_at_once(served: Served) -> None:
    answer = await served.gateway.raw(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n")
    assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


@pytest.mark.parametrize(("name", "value"), ENVOY_HEADERS.items(), ids=ENVOY_HEADERS)
async def test_a_header_for_envoy_changes_nothing(served: Served, name: str, value: str) -> None:
    fail = failing("UNAVAILABLE", "starting", 3)

    async def slow(context: Context) -> Message:
        await asyncio.sleep(0.02)  # longer than the headers would allow
        return await fail(context)

    user_id = served.services.on(slow)
    answer = await served.gateway.rest("POST", f"/engines/{user_id}/admit", headers=[(name, value)])
    assert answer.error() == (503, "UNAVAILABLE", "starting")
    (call,) = served.services.calls[user_id]
    assert call.request.user_id == user_id
    assert value not in call.values(name)


async def test_planted_statistics_do_not_appear(served: Served) -> None:
    await served.gateway.rest("GET", "/health", headers=list(ENVOY_HEADERS.items()))
    statistics = await served.gateway.admin_page("/stats")
    assert b"http.gateway.downstream_rq_2xx" in statistics
    assert b"planted" not in statistics


async def test_an_answer_of_the_service_is_not_retried(served: Served) -> None:
    for code in ("UNAVAILABLE", "INTERNAL", "BOOT_TIMEOUT", "ENGINE_ALREADY_EXISTS", "RATE_LIMITED"):
        user_id = served.services.on(failing(code, "no"))
        await served.gateway.rest("POST", "/engines/provision", json.dumps({"user_id": user_id}).encode())
        assert len(served.services.calls[user_id]) == 1


@pytest.mark.parametrize("keys", [("pk-sept-1", "pk-sept-2"), ("pk-sept-2", "pk-sept-1")])
@pytest.mark.parametrize(
    ("header", "path"),
    [("x-platform-key", "/engines/twice/admit"), ("x-admin-key", "/products/twice/rotate-key")],
)
async def test_a_repeated_key_reaches_the_service_as_two_values(
    served: Served, header: str, path: str, keys: tuple[str, str]
) -> None:
    headers = [(header, keys[0]), (header.upper(), keys[1])]
    served.services.calls["twice"].clear()
    await served.gateway.rest("POST", path, headers=headers)
    (call,) = served.services.calls["twice"]
    assert call.values(header) == list(keys)


async def test_headers_that_grpc_would_take_for_its_own_do_not_pass(served: Served) -> None:
    headers = [
        ("grpc-timeout", "1n"),
        ("grpc-encoding", "gzip"),
        ("te", "x"),
        ("x-bin", "!"),
        ("content-encoding", "br"),
    ]
    answer = await served.gateway.rest("POST", "/engines/plain/admit", b"{}", headers)
    assert answer.status == 200
    (call,) = served.services.calls["plain"]
    assert not {key for key, _ in call.metadata} & {name for name, _ in headers}


async def test_every_call_has_a_request_id_of_the_gateways_own(served: Served) -> None:
    for path in ("/engines/ids", "/engines/ids?x=1", "/nowhere"):
        answer = await served.gateway.rest("GET", path, headers=[("x-request-id", "mine")])
        assert UUID(answer.header("x-request-id"))
        assert answer.header("x-request-id") != "mine"
    (call,) = served.services.calls["ids"]
    answer = await served.gateway.rest("GET", "/engines/ids")
    assert served.services.calls["ids"][1].values("x-request-id") == [answer.header("x-request-id")]
    assert call.values("x-request-id") != [answer.header("x-request-id")]


async def test_the_access_log_has_a_call_without_query_and_keys(served: Served) -> None:
    secrets = {"query": "pk-sept-in-a-query", "key": "pk-sept-in-a-header", "body": "in-a-body"}
    answer = await served.gateway.rest(
        "POST",
        f"/engines/log%2Fged/admit?key={secrets['query']}",
        b'{"auto_wake":"' + secrets["body"].encode() + b'"}',
        [("x-platform-key", secrets["key"]), ("x-admin-key", secrets["key"])],
    )
    request_id = answer.header("x-request-id")

    async def logged() -> list[dict[str, Any]]:
        return [line for line in served.gateway.calls() if line["request_id"] == request_id]

    (line,) = await eventually(logged)
    assert line["method"] == "POST"
    assert line["path"] == "/engines/log%2Fged/admit"
    assert line["status"] == 400
    assert line["duration_ms"] >= 0
    assert not [secret for secret in secrets.values() if secret in served.gateway.output.read_text()]


async def test_the_access_log_has_all_calls_but_admits_that_succeed(served: Served) -> None:
    limited = served.services.on(failing("RATE_LIMITED", "slow down"))
    rest = [
        await served.gateway.rest(method, path)
        for method, path in (
            ("POST", "/engines/quiet/admit"),
            ("POST", f"/engines/{limited}/admit"),
            ("GET", "/engines/quiet"),
        )
    ]
    async with grpc.aio.insecure_channel(served.gateway.address) as channel:
        calls = [AdmissionServiceStub(channel).Admit(admission_pb.AdmitRequest(user_id=u)) for u in ("quiet", limited)]
        outcomes = [await call.code() for call in calls]
        metadata = [[*await call.initial_metadata(), *await call.trailing_metadata()] for call in calls]
    assert outcomes == [grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]
    ids = [answer.header("x-request-id") for answer in rest]
    ids += [next(str(value) for name, value in pairs if name == "x-request-id") for pairs in metadata]
    last = (await served.gateway.rest("GET", "/health")).header("x-request-id")
    loud = {ids[1], ids[2], ids[4], last}

    async def logged() -> set[str | None] | None:
        lines = {line["request_id"] for line in served.gateway.calls()}
        return lines if loud <= lines else None

    assert not (await eventually(logged)) & {ids[0], ids[3]}


@pytest.mark.parametrize(
    ("limit", "request_"),
    [
        ("request_headers_timeout: 10s", b"GET /health HTTP/1.1\r\nhost: a\r\n"),
        ("request_timeout: 15s", b"POST /engines/slow/admit HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"),
    ],
)
async def test_a_caller_too_slow_to_ask_is_refused(tmp_path: Path, limit: str, request_: bytes) -> None:
    def impatient(config: str) -> str:
        assert limit in config
        return config.replace(limit, limit.split(":")[0] + ": 0.1s")

    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, impatient) as gateway,
    ):
        assert (await gateway.raw(request_)).own_error()[:2] == (400, "INVALID_REQUEST")
        # The service has not seen even the beginning of it.
        assert b"cluster.admission.upstream_rq_total: 0" in await gateway.admin_page("/stats")


@pytest.mark.parametrize("lane", Lane)
async def test_a_service_too_slow_to_answer_is_a_timeout(lane: Lane, tmp_path: Path) -> None:
    def impatient(config: str) -> str:
        return re.sub(r"(cluster: \w+, timeout:) [1-9][\d.]*s", r"\1 0.1s", config)

    async with (
        running_services() as services,
        running_gateway(
            tmp_path, placed(lane, services.address, LIMIT_S="0.1"), services.address, impatient
        ) as gateway,
    ):
        user_id = services.on(never(asyncio.Event()))
        services.behaviours[""] = never(asyncio.Event())
        for method in UNARY:
            answer = await gateway.rest(*method.rest_call(user_id))
            if method.name in BOOTS:
                assert answer.own_error() == (504, "BOOT_TIMEOUT", "the engine was not healthy in time")
            else:
                assert answer.own_error() == UNAVAILABLE
                assert answer.header("retry-after") == "1"
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await AdmissionServiceStub(channel).Admit(admission_pb.AdmitRequest(user_id=user_id))
        late = (raised.value.code(), raised.value.details())
        if lane is Lane.GRPC:
            assert late == (grpc.StatusCode.UNAVAILABLE, UNAVAILABLE[2])
        else:
            assert late == (grpc.StatusCode.DEADLINE_EXCEEDED, "the engine was not healthy in time")
        # Each was tried once.
        assert sum(len(calls) for calls in services.calls.values()) == len(UNARY) + 1


async def test_a_service_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1") as gateway:
        for method in METHODS.values():
            answer = await gateway.rest(*method.rest_call("a"))
            assert answer.own_error() == UNAVAILABLE
            assert answer.header("retry-after") == "1"
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await AdmissionServiceStub(channel).Admit(admission_pb.AdmitRequest(user_id="a"))
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, UNAVAILABLE[2])


async def test_a_service_that_goes_away_in_a_call_is_unavailable(tmp_path: Path) -> None:
    async with running_services() as services, running_gateway(tmp_path, services.address, services.address) as gateway:
        started = asyncio.Event()
        call = asyncio.create_task(gateway.rest("POST", f"/engines/{services.on(never(started))}/admit"))
        await started.wait()
        await services.stop()
        assert (await call).own_error() == UNAVAILABLE


async def test_more_calls_than_the_gateway_takes_are_unavailable(tmp_path: Path) -> None:
    def small(config: str) -> str:
        return config.replace("max_requests: 10000", "max_requests: 1")

    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, small) as gateway,
    ):
        started = asyncio.Event()
        call = asyncio.create_task(gateway.rest("POST", f"/engines/{services.on(never(started))}/admit"))
        await started.wait()
        answer = await gateway.rest("POST", "/engines/b/admit")
        assert answer.own_error() == UNAVAILABLE
        assert answer.header("retry-after") == "1"
        call.cancel()
