"""What REST callers send, and what they get when all is well: shapes, paths, bodies, and what is refused."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1 import product_pb2
from september.provisioner.v1 import product_service_pb2 as product_pb
from tests.e2e.gateway_process import Gateway, running_gateway
from tests.e2e.gateway_services import Context, Services, running_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDS = {
    "a%2Fb": "a/b",
    "%2F": "/",
    "..%2Fb": "../b",
    "a%2F..%2Fb": "a/../b",
    "a%5Cb": "a\\b",
    "a%20b": "a b",
    "a+b": "a+b",
    "a%2Bb": "a+b",
    "a%25b": "a%b",
    "a%252Fb": "a%2Fb",
    "a%3Fb": "a?b",
    "a%23b": "a#b",
    "a:b": "a:b",
    "a:start": "a:start",
    "a%3Aadmit": "a:admit",
    "a@b.example": "a@b.example",
    "a;b=c,d&e": "a;b=c,d&e",
    "%22%7D%5D": '"}]',
    "~a-b_c.d": "~a-b_c.d",
    "...": "...",
    "%61dmit": "admit",
    "admit": "admit",
    "provision": "provision",
    "%C3%A9%E2%82%AC%F0%9F%98%80": "é€😀",
    "a%0D%0Ab": "a\r\nb",
    "x" * 255: "x" * 255,
    "%F0%9F%98%80" * 255: "😀" * 255,
}
MALFORMED_IDS = [
    "é",
    "%",
    "%4",
    "%zz",
    "%ff",
    "%C3",
    "%C3%28",
    "%C0%AF",
    "%E0%80%80",
    "%ED%A0%80",
    "%F4%90%80%80",
    "%00",
]
ADMIT = "/september.admission.v1.AdmissionService/Admit"
ENSURE = "/september.provisioner.v1.ProvisionerService/EnsureEngine"
NO_ROUTE = [
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("GET", "/nowhere?x=1"),
    ("GET", "/engines"),
    ("GET", "/engines/"),
    ("GET", "/engines//"),
    ("GET", "//engines/a"),
    ("GET", "/engines/a//admit"),
    ("POST", "/engines/a/admit/b"),
    ("POST", "/engines/a%2Fadmit"),
    ("POST", "/engines/a:admit"),
    ("GET", "/Engines/a"),
    ("GET", "/engines/."),
    ("GET", "/engines/.."),
    ("GET", "/engines/%2e%2E"),
    ("DELETE", "/engines/"),
    ("DELETE", "/engines/a/.."),
    ("DELETE", "/engines/%2e"),
    ("POST", "/engines/a"),
    ("PUT", "/engines/a"),
    ("PATCH", "/engines/a"),
    ("OPTIONS", "/engines/a"),
    ("TRACE", "/engines/a"),
    ("GET", "/engines/a/admit"),
    ("POST", "/health"),
    ("POST", ADMIT),
    ("POST", ENSURE),
    ("GET", ENSURE),
    ("POST", "/grpc.health.v1.Health/Check"),
    ("POST", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
]
# Body of an admit, and what the gateway says to it.
NOT_JSON = "the body is not the JSON object that this call takes"
BODIES = {
    b"{": NOT_JSON,
    b"   ": NOT_JSON,
    b"nonsense": NOT_JSON,
    b"[]": NOT_JSON,
    b"null": NOT_JSON,
    b'"auto_wake: invalid value"': NOT_JSON,
    b"{} {}": NOT_JSON,
    b"{'x': nope}": NOT_JSON,
    b'{"x":"\xff"}': NOT_JSON,
    b'{"x":"\\ud800"}': NOT_JSON,
    b'{"x":1e400}': NOT_JSON,
    b'{"x":NaN}': NOT_JSON,
    b'{"x":' + b"[" * 30_000: NOT_JSON,
    b'{"x":' + b'{"x":' * 10_000: NOT_JSON,
    b"\x1f\x8b\x08\x00": NOT_JSON,
    b'{"auto_wake":[true]}': NOT_JSON,
    b'{"auto_wake":1}': "auto_wake has an invalid value",
    b'{"auto_wake":"maybe"}': "auto_wake has an invalid value",
    b'{"auto_wake":{}}': "auto_wake has an invalid value",
    b'{"autoProvision":7}': "auto_provision has an invalid value",
    b'{"user_id":"other"}': "user_id is not the same in path and body",
}


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    admission: Services
    provisioner: Services


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with (
        running_services() as admission,
        running_services() as provisioner,
        running_gateway(tmp_path_factory.mktemp("gateway"), admission.address, provisioner.address) as gateway,
    ):
        yield Served(gateway, admission, provisioner)


async def test_an_admitted_user_gets_the_engine_and_no_reason(served: Served) -> None:
    answer = await served.gateway.rest("POST", "/engines/ada/admit", b'{"auto_wake":true,"auto_provision":true}')
    assert answer.status == 200
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
    (call,) = served.admission.calls["ada"]
    assert call.request == admission_pb.AdmitRequest(user_id="ada", auto_wake=True, auto_provision=True)


@pytest.mark.parametrize("reason", [name for name, number in denial_pb2.Denial.Reason.items() if number])
async def test_a_denial_has_a_null_engine_and_its_reason(served: Served, reason: str) -> None:
    async def behaviour(context: Context) -> Message:
        return admission_pb.AdmitResponse(admitted=False, reason=denial_pb2.Denial.Reason.Value(reason))

    answer = await served.gateway.rest("POST", f"/engines/{served.admission.on(behaviour)}/admit")
    assert answer.status == 200
    assert answer.json() == {"admitted": False, "engine": None, "reason": reason}
    assert answer.body == b'{"admitted":false,"engine":null,"reason":"%s"}' % reason.encode()


async def test_get_answers_with_the_engine_itself(served: Served) -> None:
    created = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)

    async def behaviour(context: Context) -> Message:
        engine = engine_pb2.Engine(engine_id="e-2", user_id='{"engine":"}', status=engine_pb2.Engine.sleeping)
        engine.created_at.FromDatetime(created)
        return admission_pb.GetEngineResponse(engine=engine)

    answer = await served.gateway.rest("GET", f"/engines/{served.admission.on(behaviour)}")
    assert answer.status == 200
    assert answer.json() == {
        "engine_id": "e-2",
        "user_id": '{"engine":"}',
        "status": "sleeping",
        "url": "",
        "api_key": "",
        "engine_version": "",
        "created_at": "2026-02-03T04:05:06Z",
    }


async def test_the_other_methods_answer_as_the_contract_says(served: Served) -> None:
    rest = served.gateway.rest
    assert (await rest("GET", "/health")).json() == {"status": "ok"}
    provisioned = await rest("POST", "/engines/provision", b'{"user_id":"bob"}')
    assert provisioned.json() == {"engine_id": "", "user_id": "bob", "status": "running", "url": "", "api_key": ""}
    assert (await rest("DELETE", "/engines/bob")).json() == {"status": "destroyed", "engine_id": "e-1"}
    registered = await rest("POST", "/products/register", b'{"slug":"shop"}')
    assert registered.json() == {"product_id": "", "slug": "shop", "platform_api_key": ""}
    assert (await rest("PUT", "/products/p-1/policy", b'{"max_engines":5}')).json() == {
        "policy": {"max_engines": 5, "allowed_images": []}
    }
    assert [call.method for call in served.admission.calls[""]][-1] == "CheckHealth"
    methods = [call.method for key in ("bob", "shop", "p-1") for call in served.provisioner.calls[key]]
    assert methods == ["ProvisionEngine", "DestroyEngine", "RegisterProduct", "UpdatePolicy"]


async def test_an_absent_limit_is_not_printed_and_a_present_one_is(served: Served) -> None:
    async def behaviour(context: Context) -> Message:
        return product_pb.UpdatePolicyResponse(policy=product_pb2.Policy(rate_limit_rpm=1))

    answer = await served.gateway.rest("PUT", f"/products/{served.provisioner.on(behaviour)}/policy", b"{}")
    assert answer.json() == {"policy": {"max_engines": 0, "rate_limit_rpm": 1, "allowed_images": []}}


async def test_a_policy_reaches_the_service_with_all_its_fields(served: Served) -> None:
    policy: dict[str, Any] = {"max_engines": 5, "max_engine": "x", "allowed_images": ["a", None], "": {"b": True}}
    await served.gateway.rest("PUT", "/products/p-2/policy", json.dumps(policy).encode())
    await served.gateway.rest("POST", "/products/register", json.dumps({"slug": "s-2", "policy": policy}).encode())
    (updated,), (registered,) = served.provisioner.calls["p-2"], served.provisioner.calls["s-2"]
    assert MessageToDict(updated.request.policy) == policy == MessageToDict(registered.request.policy)


@pytest.mark.parametrize(("segment", "user_id"), IDS.items(), ids=[segment[:20] for segment in IDS])
async def test_an_id_in_a_path_reaches_the_service_decoded_once(served: Served, segment: str, user_id: str) -> None:
    for method, path, services, call in [
        ("GET", f"/engines/{segment}", served.admission, "GetEngine"),
        ("POST", f"/engines/{segment}/admit", served.admission, "Admit"),
        ("DELETE", f"/engines/{segment}", served.provisioner, "DestroyEngine"),
    ]:
        services.calls[user_id].clear()
        answer = await served.gateway.rest(method, path)
        assert answer.status == 200
        assert answer.json().get("user_id", user_id) == user_id
        assert [made.method for made in services.calls[user_id]] == [call]


@pytest.mark.parametrize("segment", MALFORMED_IDS)
async def test_an_id_that_is_not_percent_encoded_utf_8_is_refused(served: Served, segment: str) -> None:
    for method, path in [("GET", ""), ("POST", "/admit"), ("DELETE", "")]:
        answer = await served.gateway.rest(method, f"/engines/{segment}{path}")
        assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


async def test_a_slash_at_the_end_is_no_part_of_an_id(served: Served) -> None:
    assert (await served.gateway.rest("GET", "/engines/ina/")).json()["user_id"] == "ina"


async def test_an_empty_id_stays_empty(served: Served) -> None:
    await served.gateway.rest("POST", "/engines//admit")
    assert served.admission.calls[""][-1].request == admission_pb.AdmitRequest()


@pytest.mark.parametrize(("method", "path"), NO_ROUTE)
async def test_an_unknown_path_or_verb_is_route_not_found(served: Served, method: str, path: str) -> None:
    answer = await served.gateway.rest(method, path, b"{}")
    assert answer.own_error()[:2] == (404, "ROUTE_NOT_FOUND")


async def test_head_has_the_status_without_the_body(served: Served) -> None:
    answer = await served.gateway.rest("HEAD", "/engines/a")
    assert (answer.status, answer.body) == (404, b"")


@pytest.mark.parametrize("kind", ["json", "proto", "connect+json", "grpc-web", "grpc-web+proto"])
@pytest.mark.parametrize("method", [ADMIT, ENSURE])
async def test_other_protocols_than_rest_and_grpc_have_no_route(served: Served, kind: str, method: str) -> None:
    headers = [("content-type", f"application/{kind}")]
    answer = await served.gateway.rest("POST", method, b"{}", headers)
    assert answer.own_error()[:2] == (404, "ROUTE_NOT_FOUND")


@pytest.mark.parametrize("query", ["user_id=other", "auto_wake=true", "user_id", ""])
async def test_a_query_is_refused_and_overrides_no_path(served: Served, query: str) -> None:
    for method, path in [("GET", "/engines/q"), ("POST", "/engines/q/admit"), ("DELETE", "/engines/q")]:
        answer = await served.gateway.rest(method, f"{path}?{query}")
        expected = "unknown query parameter auto_wake" if query == "auto_wake=true" and method != "POST" else None
        assert answer.own_error() == (
            400,
            "INVALID_REQUEST",
            expected or "this call takes no query parameters",
        )
    assert not any(services.calls[key] for services in (served.admission, served.provisioner) for key in ("q", "other"))


@pytest.mark.parametrize(("query", "name"), [("x=1", "x"), ("engine.url=1", "engine"), ("x%22y=1", None)])
async def test_an_unknown_query_parameter_is_refused_by_name(served: Served, query: str, name: str | None) -> None:
    status, code, message = (await served.gateway.rest("GET", f"/engines/q?{query}")).own_error()
    assert (status, code) == (400, "INVALID_REQUEST")
    assert name is None or message == f"unknown query parameter {name}"


@pytest.mark.parametrize(("body", "message"), BODIES.items(), ids=[repr(body[:24]) for body in BODIES])
async def test_an_invalid_body_is_refused_and_the_field_named(served: Served, body: bytes, message: str) -> None:
    answer = await served.gateway.rest("POST", "/engines/nobody/admit", body)
    assert answer.own_error() == (400, "INVALID_REQUEST", message)
    assert not served.admission.calls["nobody"]


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"auto_wake":false}', b'{"auto_wake":null}'])
async def test_an_empty_body_means_both_false(served: Served, body: bytes | None) -> None:
    assert (await served.gateway.rest("POST", "/engines/eve/admit", body)).status == 200
    assert served.admission.calls["eve"][-1].request == admission_pb.AdmitRequest(user_id="eve")


async def test_unknown_fields_of_a_body_are_ignored(served: Served) -> None:
    body = b'{"no_such_field":{"a":[1,"b"]},"userId":"other","auto_wake":true}'
    assert (await served.gateway.rest("POST", "/engines/fay/admit", body)).status == 200
    assert served.admission.calls["fay"][-1].request == admission_pb.AdmitRequest(user_id="fay", auto_wake=True)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_body_where_none_belongs_changes_no_id(served: Served, method: str) -> None:
    refused = await served.gateway.rest(method, "/engines/gus", b'{"user_id":"other"}')
    assert refused.own_error() == (400, "INVALID_REQUEST", "user_id is not the same in path and body")
    assert (await served.gateway.rest(method, "/engines/gus", b'{"userId":"other"}')).status == 200
    services = served.admission if method == "GET" else served.provisioner
    assert services.calls["gus"][-1].request.user_id == "gus"


async def test_a_body_of_64_kib_passes_and_one_byte_more_does_not(served: Served) -> None:
    def body(size: int) -> bytes:
        return b'{"slug":"kib","x":"' + b"x" * (size - 21) + b'"}'

    assert (await served.gateway.rest("POST", "/products/register", body(65_536))).status == 200
    for size in (65_537, 200_000, 3_000_000):
        answer = await served.gateway.rest("POST", "/products/register", body(size))
        assert answer.own_error() == (400, "INVALID_REQUEST", "the body is over 64 KiB")
    assert len(served.provisioner.calls["kib"]) == 1


async def test_a_body_that_grows_over_64_kib_in_protobuf_is_refused_too(served: Served) -> None:
    body = b'{"x":[' + b"1," * 20_000 + b"1]}"
    answer = await served.gateway.rest("PUT", "/products/grown/policy", body)
    assert answer.own_error() == (400, "INVALID_REQUEST", "the body is over 64 KiB")
    assert not served.provisioner.calls["grown"]


async def test_a_body_in_chunks_is_read(served: Served) -> None:
    answer = await served.gateway.raw(
        b"POST /engines/hal/admit HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        b'6\r\n{"auto\r\nc\r\n_wake":true}\r\n0\r\n\r\n'
    )
    assert answer.status == 200
    assert served.admission.calls["hal"][-1].request == admission_pb.AdmitRequest(user_id="hal", auto_wake=True)
