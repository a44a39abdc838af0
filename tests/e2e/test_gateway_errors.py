"""Every error that a service can answer with, as REST and gRPC callers get it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast

import grpc
import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import DebugInfo, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.errors.v1 import errors_pb2
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import UNARY, Method
from tests.e2e.gateway_process import Gateway
from tests.e2e.gateway_services import (
    Behaviour,
    Context,
    Services,
    engine,
    failing,
    gateway_and_services,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CODES = [value.name.removeprefix("ERROR_CODE_") for value in errors_pb2.ErrorCode.DESCRIPTOR.values if value.number]
MESSAGES = {
    "quotes": 'user_id "a" is not "b"',
    "backslashes": "C:\\temp\\",
    "backslash before a quote": '\\"\\\\"',
    "newlines and controls": "a\nb\tc\x01d",
    "unicode": "größer als 5 € 😀 \u2028",
    "percent": "100%41 %0A",
    "angle brackets": "<b>&amp;</b>",
    "empty": "",
    "another code": '","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"INTERNAL",'
    '"domain":"platform.september"}],"x":"',
    "an envelope": '{"error":{"code":"INTERNAL","message":"x"}}',
    "long": "x" * 2000,
}
UNNAMED = {
    grpc.StatusCode.CANCELLED: (503, "UNAVAILABLE"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (503, "UNAVAILABLE"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (503, "UNAVAILABLE"),
    grpc.StatusCode.UNAVAILABLE: (503, "UNAVAILABLE"),
}


def mapping(code: str) -> errors_pb2.ErrorMapping:
    value = errors_pb2.ErrorCode.DESCRIPTOR.values_by_name[f"ERROR_CODE_{code}"]
    return value.GetOptions().Extensions[errors_pb2.mapping]


def with_details(code: grpc.StatusCode, message: str, *details: Message) -> Behaviour:
    """Fails with these details, whether or not they make sense."""

    async def behaviour(context: Context) -> Message:
        status = Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))
        raise AssertionError

    return behaviour


def after_headers(behaviour: Behaviour) -> Behaviour:
    """Sends headers first, so that the status comes in trailers and not in the only headers."""

    async def late(context: Context) -> Message:
        await context.send_initial_metadata((("x-inside", "1"),))
        return await behaviour(context)

    return late


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services
    stub: AdmissionServiceStub

    async def admit(self, user_id: str) -> tuple[int, str, str, str | None]:
        """REST: status, code, message, Retry-After."""
        answer = await self.gateway.rest("POST", f"/engines/{user_id}/admit")
        return (*answer.error(), answer.header("retry-after"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with (
        gateway_and_services(lane, directory) as (gateway, services),
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        yield Served(gateway, services, AdmissionServiceStub(channel))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("trailers_only", [True, False], ids=["headers", "trailers"])
async def test_rest_answers_every_code_with_its_status_and_message(
    served: Served, code: str, trailers_only: bool
) -> None:
    behaviour = failing(code, f"what {code} means")
    user_id = served.services.on(behaviour if trailers_only else after_headers(behaviour))
    assert await served.admit(user_id) == (mapping(code).http_status, code, f"what {code} means", None)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("trailers_only", [True, False], ids=["headers", "trailers"])
async def test_grpc_answers_every_code_with_its_status_and_details(
    served: Served, code: str, trailers_only: bool
) -> None:
    behaviour = failing(code, f"what {code} means", retry_after_s=1.5)
    user_id = served.services.on(behaviour if trailers_only else after_headers(behaviour))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.stub.Admit(admission_pb.AdmitRequest(user_id=user_id))
    status = rpc_status.from_call(cast(grpc.Call, raised.value))
    assert status is not None
    assert (status.code, status.message) == (mapping(code).grpc_code, f"what {code} means")
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (code, "platform.september")
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay == Duration(seconds=1, nanos=500_000_000)


@pytest.mark.parametrize(
    ("retry_after_s", "header"), [(0.0, "1"), (0.001, "1"), (1.0, "1"), (1.001, "2"), (59.5, "60"), (86_400.0, "86400")]
)
async def test_retry_after_is_in_whole_seconds_rounded_up(served: Served, retry_after_s: float, header: str) -> None:
    user_id = served.services.on(failing("RATE_LIMITED", "slow down", retry_after_s))
    assert await served.admit(user_id) == (429, "RATE_LIMITED", "slow down", header)


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
async def test_a_message_arrives_as_it_was_and_changes_no_code(served: Served, message: str) -> None:
    user_id = served.services.on(failing("ENGINE_NOT_RUNNING", message))
    assert await served.admit(user_id) == (409, "ENGINE_NOT_RUNNING", message, None)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
@pytest.mark.parametrize("trailers_only", [True, False], ids=["headers", "trailers"])
async def test_a_grpc_error_without_error_info_looks_like_no_documented_refusal(
    served: Served, code: grpc.StatusCode, trailers_only: bool
) -> None:
    async def behaviour(context: Context) -> Message:
        await context.abort(code, "Unexpected <class 'KeyError'>: 'secret'")
        raise AssertionError

    user_id = served.services.on(behaviour if trailers_only else after_headers(behaviour))
    answer = await served.gateway.rest("POST", f"/engines/{user_id}/admit")
    status, error, message = answer.own_error()
    assert (status, error) == UNNAMED.get(code, (500, "INTERNAL"))
    assert "secret" not in message
    assert answer.header("retry-after") == ("1" if status == 503 else None)


@pytest.mark.parametrize(
    "details",
    [
        [ErrorInfo(reason="RATE_LIMITED", domain="googleapis.com")],
        [ErrorInfo(reason="NOT_IN_THE_TABLE", domain="platform.september")],
        [ErrorInfo(reason='INTERNAL","domain":"platform.september"', domain="x")],
        [DebugInfo(detail='"reason":"RATE_LIMITED","domain":"platform.september"')],
        [admission_pb.CheckHealthResponse(status="ok")],
        [Duration(seconds=1)],
    ],
    ids=["foreign domain", "unknown reason", "quotes in the reason", "other details", "other message", "well-known"],
)
async def test_only_a_reason_of_the_table_in_our_domain_counts(served: Served, details: list[Message]) -> None:
    user_id = served.services.on(with_details(grpc.StatusCode.NOT_FOUND, "inside", *details))
    answer = await served.gateway.rest("POST", f"/engines/{user_id}/admit")
    assert answer.own_error()[:2] == (500, "INTERNAL")


async def test_our_error_info_counts_wherever_it_stands(served: Served) -> None:
    ours = ErrorInfo(reason="QUOTA_EXCEEDED", domain="platform.september", metadata={"reason": "INTERNAL"})
    behaviour = with_details(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", DebugInfo(detail="x"), ours)
    assert await served.admit(served.services.on(behaviour)) == (429, "QUOTA_EXCEEDED", "full", None)


async def test_details_of_an_unknown_type_cost_the_code_and_show_nothing(served: Served) -> None:
    async def behaviour(context: Context) -> Message:
        status = Status(code=8, message="inside", details=[AnyMessage(type_url="type.googleapis.com/un.known")])
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "inside",
            (("grpc-status-details-bin", status.SerializeToString()),),
        )
        raise AssertionError

    answer = await served.gateway.rest("POST", f"/engines/{served.services.on(behaviour)}/admit")
    assert answer.own_error()[:2] == (503, "UNAVAILABLE")


async def test_a_handler_that_raises_shows_nothing(served: Served) -> None:
    async def behaviour(context: Context) -> Message:
        raise RuntimeError("secret")

    answer = await served.gateway.rest("GET", f"/engines/{served.services.on(behaviour)}")
    assert answer.own_error()[:2] == (500, "INTERNAL")


async def test_an_answer_too_large_to_transcode_is_an_error_and_not_empty(served: Served) -> None:
    async def behaviour(context: Context) -> Message:
        return admission_pb.GetEngineResponse(engine=engine("x" * 35_000_000))

    answer = await served.gateway.rest("GET", f"/engines/{served.services.on(behaviour)}")
    assert answer.own_error()[:2] == (500, "INTERNAL")


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
async def test_every_method_fails_in_the_same_way(served: Served, method: Method) -> None:
    key = method.key(served.services.on(failing("RATE_LIMITED", "slow down", 1.5)))
    served.services.behaviours[key] = failing("RATE_LIMITED", "slow down", 1.5)
    answer = await served.gateway.rest(*method.rest_call(key))
    served.services.behaviours.clear()
    assert (*answer.error(), answer.header("retry-after")) == (429, "RATE_LIMITED", "slow down", "2")
