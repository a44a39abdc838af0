"""AdmissionService from bytes to bytes: what every host of it serves, whatever brings the calls."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from september.admission.v1 import admission_service_pb2 as pb
from september.engine.v1 import denial_pb2, engine_pb2
from services.admission.admit import Admission
from services.admission.domain import Admitted, Engine
from services.shared.errors import InvalidRequest
from services.shared.timestamps import to_timestamp

KEY_HEADER = "x-platform-key"
SERVICE = pb.DESCRIPTOR.services_by_name["AdmissionService"].full_name

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class Call:
    """What a host knows of a call besides its request.

    Args:
        platform_keys: every value of the caller's key header, in order.
        timeout_s: how long the caller waits, in seconds; None if it did not say.
        address: gives the caller's address of IP.
    """

    platform_keys: Sequence[str] = field(repr=False)
    timeout_s: float | None
    address: Callable[[], str]


Method = Callable[[bytes, Call], Awaitable[bytes]]


class AdmissionCalls:
    """The methods of the service by name, each from an encoded request to an encoded response.

    They raise `ServiceError`s, which are the host's to answer.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.methods: Mapping[str, Method] = {
            "Admit": self._admit,
            "GetEngine": self._get_engine,
            "CheckHealth": self._check_health,
        }

    async def _admit(self, request: bytes, call: Call) -> bytes:
        message = _parsed(pb.AdmitRequest, request)
        decision = await self._admission.admit(
            call.platform_keys,
            message.user_id,
            call.address,
            auto_provision=message.auto_provision,
            auto_wake=message.auto_wake,
            keep_awake_s=message.keep_awake_s,
            timeout_s=call.timeout_s,
        )
        if isinstance(decision, Admitted):
            return _admitted(decision.engine)
        reason = denial_pb2.Denial.Reason.Value(decision.reason)
        return pb.AdmitResponse(admitted=False, reason=reason).SerializeToString()

    async def _get_engine(self, request: bytes, call: Call) -> bytes:
        message = _parsed(pb.GetEngineRequest, request)
        engine = await self._admission.engine(call.platform_keys, message.user_id, call.address)
        return pb.GetEngineResponse(engine=_to_message(engine)).SerializeToString()

    async def _check_health(self, request: bytes, call: Call) -> bytes:
        _parsed(pb.CheckHealthRequest, request)
        return pb.CheckHealthResponse(status="ok").SerializeToString()


def _parsed(message: type[_M], request: bytes) -> _M:
    try:
        return message.FromString(request)
    except DecodeError as error:
        raise InvalidRequest("the message is malformed") from error


def _admitted(engine: Engine) -> bytes:
    """The answer that admits to an engine, made once for each object that stands for it."""
    if engine.answer is None:
        engine.answer = pb.AdmitResponse(admitted=True, engine=_to_message(engine)).SerializeToString()
    return engine.answer


def _to_message(engine: Engine) -> engine_pb2.Engine:
    return engine_pb2.Engine(
        engine_id=str(engine.engine_id),
        user_id=engine.user_id,
        status=engine_pb2.Engine.Status.Value(engine.status),
        url=engine.url,
        api_key=engine.api_key,
        engine_version=engine.engine_version,
        created_at=to_timestamp(engine.created_at),
        last_health_at=to_timestamp(engine.last_health_at),
    )
