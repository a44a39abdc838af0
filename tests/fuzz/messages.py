"""Messages of every RPC of every service: right ones, wrong ones, and right ones gone wrong."""

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta, timezone
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Value
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from services.shared.authorization import ROLES, Role
from tests.e2e.gateway_calls import SERVICES
from tests.fuzz.targets import DEADLINE_S, Tally, Targets, Verdict

_BATCH = 20
# Of callers' mistakes and refusals. Nothing else may come of a message, whatever it is.
_ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_METHODS = [method for service in SERVICES for method in service.methods]
# The one engine's own methods that leave it as it is, and end.
_READS = {"Admit", "GetEngine", "GetEngineHistory", "EnsureEngine", "ListAuditEvents"}

_text = st.text(max_size=20) | st.sampled_from(
    ["", ".", "..", "a/b", "a\0b", "\u2028", "é" * 255, "x" * 256, "running"]
)
_uuid = st.uuids().map(str) | st.sampled_from(["{" + "0" * 32 + "}", "urn:uuid:", "٣" * 32])
_offsets = st.none() | st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)))
_token = st.builds(
    lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    _text
    | st.integers(-(2**70), 2**70).map(str)
    | st.builds("{} {}".format, st.datetimes(timezones=_offsets).map(lambda at: at.isoformat()), _uuid),
)
_int32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 1000, 1001, -1, 2**31 - 1])
_names = st.sampled_from(["max_engines", "rate_limit_rpm", "allowed_images", "idle_sleep_after_s", "max_keep_awake_s"])
_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(0, 100).map(float) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text | _names, inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Call:
    """A call, as bytes.

    Args:
        keys: 0 for wrong ones.
    """

    service: str
    method: str
    streams: bool
    message: bytes
    keys: int
    idempotency_key: str

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.method}"

    @property
    def is_operators(self) -> bool:
        role = ROLES.get(self.path)
        return role is Role.ADMIN or (role is Role.PRODUCT_OR_ADMIN and self.keys % 2 == 1)


def _value(plain: Any) -> Any:
    """A `google.protobuf.Value` that may hold what JSON can't."""
    value = Value()
    if isinstance(plain, bool):
        value.bool_value = plain
    elif isinstance(plain, float):
        value.number_value = plain
    elif isinstance(plain, str):
        value.string_value = plain
    elif isinstance(plain, list):
        value.list_value.values.extend(map(_value, plain))
    elif isinstance(plain, dict):
        value.struct_value.SetInParent()
        for name, inner in plain.items():
            value.struct_value.fields[name].CopyFrom(_value(inner))
    # None is left without any kind.
    return value


def _struct(fields: dict[str, Any]) -> Any:
    return _value(fields).struct_value


def _of_field(field: FieldDescriptor, method: str, targets: Targets) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_INT32:
        return _int32
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return st.dictionaries(_names | _text, _json, max_size=4).map(_struct)
    if field.name == "user_id" and method in _READS:
        return _text | st.just(targets.user_id)
    if field.name == "product_id":
        return _text | _uuid | st.just(targets.changed_id)
    return _text | (_token if field.name == "page_token" else _uuid)


def _right(descriptor: Descriptor, method: str, targets: Targets) -> st.SearchStrategy[bytes]:
    """Encoded messages of a type."""
    kind: Callable[..., Message] = GetMessageClass(descriptor)
    fields = {field.name: _of_field(field, method, targets) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values).SerializeToString())


def _nested(depth: int) -> bytes:
    """The second field within the second field, and so on."""
    message = b""
    for _ in range(depth):
        size, length = len(message), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        message = b"\x12" + length + bytes([size]) + message
    return message


_APPENDED = [
    b"\x0a\x02\xff\xfe",  # not UTF-8
    b"\x0a\x03\xed\xa0\x80",  # a surrogate
    b"\x08" + b"\xff" * 11,  # a number that does not end
    b"\x0a" + b"\xff" * 9 + b"\x01",  # longer than memory
    b"\x0b" * 5000,  # groups within groups
    b"\x0c",  # the end of none
    b"\x00\x00",  # no field has the number 0
    b"\xfa\xff\xff\xff\x0f\x01a",  # a field of the highest number
    _nested(99), _nested(3000),
    b"\x12\x04\x0a\x02\x0a\x00" * 2000,
]  # fmt: skip


@st.composite
def _gone_wrong(draw: st.DrawFn, right: st.SearchStrategy[bytes]) -> bytes:
    message = draw(right)
    at = draw(st.integers(0, len(message)))
    return draw(
        st.sampled_from(
            [
                message[:at],
                message[:at] + b"\xff" + message[at:],
                message[:at] + bytes([message[at] ^ 0x81]) + message[at + 1 :] if at < len(message) else message * 2,
                *(message + appended for appended in _APPENDED),
            ]
        )
    )


def calls(targets: Targets) -> st.SearchStrategy[Call]:
    """Calls of every method, one as likely as the other."""
    of_method = []
    for method in _METHODS:
        right = _right(method.input_type, method.name, targets)
        of_method.append(
            st.builds(
                Call,
                service=st.just(method.containing_service.full_name),
                method=st.just(method.name),
                streams=st.just(method.server_streaming),
                message=right | right | _gone_wrong(right) | st.binary(max_size=60),
                keys=st.integers(0, 7),
                idempotency_key=st.just("") | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3),
            )
        )
    return st.one_of(of_method)


def feed(runner: asyncio.Runner, targets: Targets, tally: Tally, number: int, seed_: int) -> None:
    """Sends about so many messages, each directly and through both gateways."""
    direct = {"AdmissionService": targets.admission.address}
    gateways = list(targets.gateways.values())
    channels: dict[str, grpc.aio.Channel] = {}
    batch: list[Call] = []

    async def open_() -> None:
        for address in (targets.admission.address, targets.provisioner.address, *targets.listeners):
            channels[address] = grpc.aio.insecure_channel(address)

    async def send(address: str, call: Call) -> None:
        channel: Any = channels[address]
        method = (channel.unary_stream if call.streams else channel.unary_unary)(call.path)
        sent = method(call.message, metadata=_metadata(call, targets), timeout=DEADLINE_S)
        code, details = await sent.code(), await sent.details()
        # Each listener has its methods.
        absent = code is grpc.StatusCode.UNIMPLEMENTED and address in targets.listeners
        expected = code in _ANSWERS or absent
        complaint = None if expected else f"{code.name} {details} of {address}"
        tally.count(Verdict(complaint, code is not grpc.StatusCode.OK and not absent), call)

    async def send_all(batch: list[Call]) -> None:
        async with asyncio.TaskGroup() as group:
            for call in batch:
                service = call.service.rpartition(".")[2]
                group.create_task(send(direct.get(service, targets.provisioner.address), call))
                for gateway in gateways:
                    group.create_task(send(gateway.operators if call.is_operators else gateway.address, call))

    @seed(seed_)
    @settings(
        max_examples=-(-number // (_BATCH * 3)) * _BATCH,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(targets))
    def some(call: Call) -> None:
        # One by one: of a list most would be copies of others in it.
        batch.append(call)
        if len(batch) == _BATCH:
            runner.run(send_all(batch))
            batch.clear()

    async def close() -> None:
        for channel in channels.values():
            await channel.close()

    runner.run(open_())
    try:
        some()
    finally:
        runner.run(close())


def _metadata(call: Call, targets: Targets) -> list[tuple[str, str]]:
    name, key = targets.headers[call.is_operators]
    metadata = [(name, key if call.keys else "none")]
    return [*metadata, ("idempotency-key", call.idempotency_key)] if call.idempotency_key else metadata
