"""gRPC through the gateway's port: which methods exist, and that calls pass as they are."""

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.engine.v1 import denial_pb2
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import METHODS, Method
from tests.e2e.gateway_process import Gateway, placed, running_gateway
from tests.e2e.gateway_services import Context, Services, running_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMISSION = "/september.admission.v1.AdmissionService/"
PROVISIONER = "/september.provisioner.v1.ProvisionerService/"
ADMIT = ADMISSION + "Admit"
NOT_SERVED = [
    PROVISIONER + "EnsureEngine",
    PROVISIONER + "ensureengine",
    ADMISSION + "NoSuchMethod",
    ADMISSION + "Admit/",
    "//" + ADMIT[1:],
    ADMIT.replace("/Admit", "%2FAdmit"),
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/engines/a/admit",
    "/",
]


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    admission: Services
    provisioner: Services
    channel: grpc.aio.Channel
    operators: grpc.aio.Channel

    async def call(self, method: str, request: bytes, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> bytes:
        def as_is(message: bytes) -> bytes:
            return message

        channel = self.operators if "ProductService" in method else self.channel
        unary: Any = channel.unary_unary(method, as_is, as_is)
        answer: bytes = await unary(request, metadata=metadata, timeout=10)
        return answer

    async def error(self, method: str, request: bytes = b"") -> tuple[grpc.StatusCode, str | None]:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request)
        return raised.value.code(), raised.value.details()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with (
        running_services() as admission,
        running_services() as provisioner,
        running_gateway(directory, placed(lane, admission.address), provisioner.address) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
        grpc.aio.insecure_channel(gateway.operators) as operators,
    ):
        yield Served(gateway, admission, provisioner, channel, operators)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_public_method_reaches_its_service(served: Served, method: Method) -> None:
    services, others = served.admission, served.provisioner
    if not method.is_admission:
        services, others = others, services
    key, request = method.key("ann"), method.request("ann")
    services.calls[key].clear()
    others.calls[key].clear()
    # A watch ends after its first message, and so looks like any call.
    await served.call(method.grpc_path, request.SerializeToString())
    assert [(call.method, call.request) for call in services.calls[key]] == [(method.name, request)]
    assert not others.calls[key]


@pytest.mark.parametrize("method", NOT_SERVED)
async def test_anything_else_is_unimplemented(served: Served, method: str) -> None:
    assert await served.error(method) == (grpc.StatusCode.UNIMPLEMENTED, "no such method")
    assert "EnsureEngine" not in {c.method for calls in served.provisioner.calls.values() for c in calls}


async def test_a_denial_is_not_touched(served: Served) -> None:
    denied = admission_pb.AdmitResponse(admitted=False, reason=denial_pb2.Denial.engine_sleeping)

    async def behaviour(context: Context) -> Message:
        return denied

    request = admission_pb.AdmitRequest(user_id=served.admission.on(behaviour))
    assert await served.call(ADMIT, request.SerializeToString()) == denied.SerializeToString()


async def test_services_get_only_metadata_that_they_know(served: Served) -> None:
    metadata = (
        ("x-platform-key", "pk-sept-1"),
        ("x-admin-key", "a"),
        ("x-request-id", "mine"),
        ("x-other", "1"),
        ("x-other-bin", b"\0"),
        ("x-envoy-original-path", "/engines/b?x"),
        ("x-envoy-upstream-rq-timeout-ms", "1"),
    )
    await served.call(ADMIT, admission_pb.AdmitRequest(user_id="cat").SerializeToString(), metadata)
    (call,) = served.admission.calls["cat"]
    assert call.values("x-platform-key") == ["pk-sept-1"]
    assert {key for key, _ in call.metadata} - {"content-length", "x-envoy-external-address", "x-forwarded-proto"} == {
        "user-agent", "x-platform-key", "x-request-id",
    }  # fmt: skip


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto"])
async def test_a_deadline_of_the_caller_reaches_the_service(served: Served, content_type: str) -> None:
    remaining = []

    async def behaviour(context: Context) -> Message:
        remaining.append(context.time_remaining())
        return admission_pb.AdmitResponse()

    request = admission_pb.AdmitRequest(user_id=served.admission.on(behaviour)).SerializeToString()
    await served.gateway.rest(
        "POST",
        ADMIT,
        struct.pack(">BI", 0, len(request)) + request,
        [("content-type", content_type), ("te", "trailers"), ("grpc-timeout", "10S")],
    )
    # gRPC rounds up when it passes one on.
    assert 5 < remaining[0] <= 11


async def test_a_compressed_message_passes(served: Served) -> None:
    stub = AdmissionServiceStub(served.channel)
    request = admission_pb.AdmitRequest(user_id="g" * 200)
    answer = await stub.Admit(request, compression=grpc.Compression.Gzip)
    assert answer.engine.user_id == request.user_id
    (call,) = served.admission.calls[request.user_id]
    assert all(int(str(size)) < 100 for size in call.values("content-length"))


async def test_a_message_of_64_kib_passes_and_one_byte_more_does_not(served: Served) -> None:
    def request(size: int) -> bytes:
        return admission_pb.AdmitRequest(user_id="d" * (size - 4)).SerializeToString()

    assert len(request(65_536)) == 65_536
    await served.call(ADMIT, request(65_536))
    for size in (65_537, 3_000_000):
        error = await served.error(ADMIT, request(size))
        assert error == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the message is over 64 KiB")


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+json", "application/grpc+proto"])
async def test_ensure_engine_is_out_of_reach_for_every_kind_of_grpc(served: Served, content_type: str) -> None:
    for method in (PROVISIONER + "EnsureEngine", PROVISIONER + "ProvisionEngine/../EnsureEngine"):
        answer = await served.gateway.rest("POST", method, b"\0\0\0\0\0", [("content-type", content_type)])
        assert (answer.header("grpc-status"), answer.header("grpc-message")) == ("12", "no such method")


async def test_metadata_with_an_underscore_is_refused(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await served.call(ADMIT, admission_pb.AdmitRequest(user_id="fox").SerializeToString(), (("x_key", "1"),))
    assert not served.admission.calls["fox"]


@pytest.mark.parametrize("body", [b"", b"\0\0", b"\0\0\0\0\2\x08", b"\0\0\0\0\0" * 2, b"\0\0\0\0\0a", b"\2\0\0\0\0"])
@pytest.mark.parametrize("method", [ADMIT, PROVISIONER + "StartEngine"])
async def test_what_is_not_one_message_is_refused_at_once(served: Served, method: str, body: bytes) -> None:
    headers = [("content-type", "application/grpc"), ("te", "trailers")]
    async with asyncio.timeout(5):
        answer = await served.gateway.rest("POST", method, body, headers)
    assert answer.header("grpc-status") in ("3", "13")
    assert answer.header("grpc-message") in (
        "the message is malformed",
        "the request is malformed or did not arrive in time",
    )


@pytest.mark.parametrize("method", [ADMIT, PROVISIONER + "StartEngine"])
async def test_a_caller_that_takes_no_trailers_is_refused(served: Served, method: str) -> None:
    answer = await served.gateway.rest("POST", method, b"\0\0\0\0\0", [("content-type", "application/grpc")])
    assert answer.header("grpc-status") in ("3", "13")
