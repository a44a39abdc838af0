"""What REST callers send: paths and bodies, how they reach the services, and what is refused."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import METHODS, Method
from tests.e2e.gateway_process import Gateway, placed, running_gateway
from tests.e2e.gateway_services import Services, running_services

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
    ("POST", "/engines"),
    ("GET", "/engines/"),
    ("GET", "/engines//"),
    ("GET", "/engines/?limit=5"),
    ("GET", "/engines/a/"),
    ("GET", "/engines/a/history/"),
    ("GET", "/engines/a/history/?limit=5"),
    ("GET", "/products/"),
    ("GET", "/products/p/"),
    ("GET", "/status/"),
    ("GET", "/health/"),
    ("POST", "/engines/a/start/"),
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
    ("GET", "/engines/a/start"),
    ("PUT", "/engines/a/stop"),
    ("POST", "/engines/a/rotate_key"),
    ("POST", "/engines/a/watch"),
    ("POST", "/engines/a/history"),
    ("POST", "/engines/a/ensure"),
    ("GET", "/engines/a/watch/b"),
    ("POST", "/status"),
    ("POST", "/audit"),
    ("DELETE", "/audit"),
    ("POST", "/products"),
    ("POST", "/products/p"),
    ("DELETE", "/products/p"),
    ("GET", "/products/p/policy"),
    ("PUT", "/products/p/disable"),
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
OF_A_USER = [method for method in METHODS.values() if "{user_id}" in method.rest]


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    admission: Services
    provisioner: Services


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with (
        running_services() as admission,
        running_services() as provisioner,
        running_gateway(directory, placed(lane, admission.address), provisioner.address) as gateway,
    ):
        yield Served(gateway, admission, provisioner)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_path_reaches_its_method(served: Served, method: Method) -> None:
    services, others = served.admission, served.provisioner
    if not method.is_admission:
        services, others = others, services
    key = method.key("bob")
    services.calls[key].clear()
    others.calls[key].clear()
    assert (await served.gateway.rest(*method.rest_call("bob"))).status == 200
    assert [call.method for call in services.calls[key]] == [method.name]
    assert not others.calls[key]


async def test_a_policy_reaches_the_service_with_all_its_fields(served: Served) -> None:
    policy: dict[str, Any] = {"max_engines": 5, "max_engine": "x", "allowed_images": ["a", None], "": {"b": True}}
    await served.gateway.rest("PUT", "/products/p-2/policy", json.dumps(policy).encode())
    await served.gateway.rest("POST", "/products/register", json.dumps({"slug": "s-2", "policy": policy}).encode())
    (updated,), (registered,) = served.provisioner.calls["p-2"], served.provisioner.calls["s-2"]
    assert MessageToDict(updated.request.policy) == policy == MessageToDict(registered.request.policy)


@pytest.mark.parametrize("method", OF_A_USER, ids=lambda method: method.name)
async def test_an_id_in_a_path_reaches_the_service_decoded_once(served: Served, method: Method) -> None:
    services = served.admission if method.is_admission else served.provisioner
    for segment, user_id in IDS.items():
        services.calls[user_id].clear()
        assert (await served.gateway.rest(*method.rest_call(segment))).status == 200
        assert [(call.method, call.request.user_id) for call in services.calls[user_id]] == [(method.name, user_id)]


@pytest.mark.parametrize("segment", MALFORMED_IDS)
async def test_an_id_that_is_not_percent_encoded_utf_8_is_refused(served: Served, segment: str) -> None:
    for method in OF_A_USER:
        answer = await served.gateway.rest(*method.rest_call(segment))
        assert answer.own_error()[:2] == (400, "INVALID_REQUEST")


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


@pytest.mark.parametrize("method", [m for m in OF_A_USER if m.name != "Admit"], ids=lambda method: method.name)
async def test_a_body_where_none_belongs_changes_no_id(served: Served, method: Method) -> None:
    services = served.admission if method.is_admission else served.provisioner
    services.calls["gus"].clear()
    verb, path, _ = method.rest_call("gus")
    refused = await served.gateway.rest(verb, path, b'{"user_id":"other"}')
    assert refused.own_error() == (400, "INVALID_REQUEST", "user_id is not the same in path and body")
    refused = await served.gateway.rest(verb, path, b"{")
    assert refused.own_error() == (400, "INVALID_REQUEST", NOT_JSON)
    assert not services.calls["gus"]
    assert (await served.gateway.rest(verb, path, b'{"userId":"other"}')).status == 200
    assert [call.request.user_id for call in services.calls["gus"]] == ["gus"]


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"grace_s":null}', b'{"grace_s":60}'])
async def test_a_key_is_rotated_with_the_grace_of_the_body(served: Served, body: bytes | None) -> None:
    assert (await served.gateway.rest("POST", "/products/p-3/rotate-key", body)).status == 200
    expected = product_pb.RotatePlatformKeyRequest(product_id="p-3", grace_s=60 if body and b"60" in body else 0)
    assert served.provisioner.calls["p-3"][-1].request == expected


@pytest.mark.parametrize("grace_s", [b"1.5", b'"soon"', b"true", b"99999999999", b"1e99", b"{}"])
async def test_a_grace_that_is_no_whole_number_is_refused_by_name(served: Served, grace_s: bytes) -> None:
    answer = await served.gateway.rest("POST", "/products/p-4/rotate-key", b'{"grace_s":' + grace_s + b"}")
    assert answer.own_error() == (400, "INVALID_REQUEST", "grace_s has an invalid value")
    assert not served.provisioner.calls["p-4"]


async def test_a_body_of_64_kib_passes_and_one_byte_more_does_not(served: Served) -> None:
    def body(size: int) -> bytes:
        return b'{"slug":"kib","x":"' + b"x" * (size - 21) + b'"}'

    assert (await served.gateway.rest("POST", "/products/register", body(65_536))).status == 200
    for size in (65_537, 200_000, 3_000_000):
        answer = await served.gateway.rest("POST", "/products/register", body(size))
        assert answer.own_error() == (400, "INVALID_REQUEST", "the body is over 64 KiB")
    assert len(served.provisioner.calls["kib"]) == 1


@pytest.mark.parametrize(
    ("path_length", "body_length", "message"),
    [
        (15_000, 45_000, "user_id is not the same in path and body"),
        (15_000, 45_001, "the body is not the JSON object that this call takes"),
        (1, 65_536, "the body is not the JSON object that this call takes"),
        (1, 65_537, "the body is over 64 KiB"),
        (1, 200_000, "the body is over 64 KiB"),
    ],
)
async def test_a_complaint_that_repeats_a_long_body_is_no_error_of_the_gateways(
    served: Served, path_length: int, body_length: int, message: str
) -> None:
    body = b'{"user_id":"' + b"x" * (body_length - 14) + b'"}'
    answer = await served.gateway.rest("POST", f"/engines/{'y' * path_length}/admit", body)
    assert answer.own_error() == (400, "INVALID_REQUEST", message)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, len(body), 999))
    head = b"POST /engines/%s/admit HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n" % (b"y" * path_length)
    answer = await served.gateway.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answer.own_error() == (400, "INVALID_REQUEST", message)


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
