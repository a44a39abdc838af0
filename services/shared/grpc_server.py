"""A gRPC server as both services run it: errors, request ids, health, limits, shutdown."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from inspect import isasyncgenfunction
from typing import Any, TypeAlias, cast
from urllib.parse import unquote
from uuid import uuid4

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from september.errors.v1 import errors_pb2
from services.shared.authorization import ROLES
from services.shared.errors import InvalidPlatformKey, InvalidRequest, RateLimited, ServiceError, Unavailable
from services.shared.metrics import ERRORS
from services.shared.tls import UNIX, Identity

ERROR_DOMAIN = "platform.september"
MAX_REQUEST_BYTES = 64 * 1024
# More than the gateway lets through and adds. Between its two limits gRPC refuses at random, as if it were overloaded.
_MAX_METADATA_BYTES = 32 * 1024
ADDRESS_HEADER = "x-envoy-external-address"
"""In which the gateway says where a call comes from; it lets nobody else say so."""

log = structlog.get_logger(__name__)

# What comes in floods, and is counted or has its cause in the log, is not written call by call.
_FLOODS = frozenset({RateLimited.code, InvalidPlatformKey.code, Unavailable.code})
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
    # As often as our own clients and the gateway ping, or they would be told to go away.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def to_status(code: str, message: str, retry_after_s: float | None = None) -> tuple[grpc.StatusCode, Status]:
    """The status of an error of the table, with `ErrorInfo` and, if waiting helps, `RetryInfo`."""
    value = errors_pb2.ErrorCode.DESCRIPTOR.values_by_name[f"ERROR_CODE_{code}"]
    grpc_code = value.GetOptions().Extensions[errors_pb2.mapping].grpc_code
    details = [AnyMessage(), AnyMessage()] if retry_after_s is not None else [AnyMessage()]
    details[0].Pack(ErrorInfo(reason=code, domain=ERROR_DOMAIN))
    if retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        details[1].Pack(RetryInfo(retry_delay=delay))
    return _STATUS_CODES[grpc_code], Status(code=grpc_code, message=message, details=details)


# As strings: at run time grpc's classes are not generic.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turns whatever a handler raises into a documented error, and hides the rest.

    A method that nobody has a role for does not exist. It also parses the request itself, so that a malformed message
    is the caller's error and not an internal one, and binds the request id to every log line of the call.
    """

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in ROLES:
            return None
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:

            async def unary(request: bytes, context: Context) -> Any:
                async with _answered(method, context):
                    return await handler.unary_unary(_parsed(parse, request), context)

            return grpc.unary_unary_rpc_method_handler(unary, None, serialize)
        if not isasyncgenfunction(handler.unary_stream):
            health_handler: Handler = handler  # which answers by itself
            return health_handler

        async def stream(request: bytes, context: Context) -> AsyncIterator[Any]:
            async with _answered(method, context):
                async for message in handler.unary_stream(_parsed(parse, request), context):
                    yield message

        return grpc.unary_stream_rpc_method_handler(cast(Any, stream), None, serialize)


def guarded(handler: Any, guard: Callable[[Context], Awaitable[None]]) -> "Handler":
    """The handler behind a guard, which lets a call through or raises."""

    async def unary(request: Any, context: Context) -> Any:
        await guard(context)
        return await handler.unary_unary(request, context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        await guard(context)
        async for message in handler.unary_stream(request, context):
            yield message

    parse, serialize = handler.request_deserializer, handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(unary, parse, serialize)
    return grpc.unary_stream_rpc_method_handler(cast(Any, stream), parse, serialize)


def _parsed(parse: Any, request: bytes) -> Any:
    if parse is None:
        return request
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidRequest("the message is malformed") from error


@asynccontextmanager
async def _answered(method: str, context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of whatever the block raises."""
    request_id = next(iter(metadata_values(context, "x-request-id")), None) or str(uuid4())
    with structlog.contextvars.bound_contextvars(request_id=request_id, method=method):
        try:
            yield
            return
        except grpc.aio.AbortError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            going = context.cancelled() or asyncio.current_task().cancelling()  # type: ignore[union-attr]
            if isinstance(error, asyncio.CancelledError) and going:
                raise
            code, status = failure_status(error, request_id)
        await context.abort(code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))


def failure_status(error: BaseException, request_id: str) -> tuple[grpc.StatusCode, Status]:
    """The status that answers what a handler has raised, which is logged.

    Args:
        error: a `ServiceError`, or something that callers learn nothing of. A CancelledError is one that
            was raised inside of the handler, not by the caller's going away: unanswered, the caller would hang.
        request_id: by which the log is found.
    """
    if isinstance(error, ServiceError):
        ERRORS.counts[error.code] += 1
        if error.code not in _FLOODS:
            log.info("call_refused", code=error.code, message=error.message)
        return to_status(error.code, error.message, error.retry_after_s)
    ERRORS.counts["INTERNAL"] += 1
    cancelled = isinstance(error, asyncio.CancelledError)
    log.error("call_cancelled_inside" if cancelled else "call_failed", exc_info=error)
    return to_status("INTERNAL", f"internal error; request id {request_id}")


def metadata_values(context: Context, key: str) -> list[str]:
    """Every value of a metadata key of a call, in order."""
    return [str(v) for k, v in context.invocation_metadata() or () if k == key]


def caller_address(context: Context) -> str:
    """The address of IP that a call comes from: of who has called the gateway, or of the peer."""
    by_gateway = metadata_values(context, ADDRESS_HEADER)
    # `ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`, `unix:`
    return by_gateway[-1] if by_gateway else unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")


class AddressTaken(Exception):
    """The server's address can't be bound."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address} is taken, or not an address of this host")


def _refuse_if_served(address: str) -> None:
    """gRPC would take the socket away from a server that lives, like one that the dead have left."""
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(address.removeprefix(UNIX)) == 0:
            raise AddressTaken(address)


class GrpcServer:
    """A server with the health service, on one address.

    Args:
        address: `host:port`, where port 0 takes a free one, or `unix:` and the path of a socket.
        interceptors: run after the one that answers errors.
        share_port: with processes that do the same; otherwise a second one on the port fails, and
            does not take part of the traffic.
        identity: what callers are shown, who must have certificates of the same CA; None for no TLS. A unix
            socket has none.
    """

    def __init__(
        self,
        address: str,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        *,
        share_port: bool = False,
        identity: Identity | None = None,
    ) -> None:
        self._address = address
        self._identity = identity
        options = (*_OPTIONS, ("grpc.so_reuseport", int(share_port)))
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(interceptors=[StatusInterceptor(), *interceptors], options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    def bind(self) -> int:
        """Takes the address; returns the port, if it has one. Calls wait until `start`.

        Raises:
            AddressTaken: another process has it, or it is not this host's.
        """
        if self._address.startswith(UNIX):
            _refuse_if_served(self._address)
        try:
            if self._identity is None or self._address.startswith(UNIX):
                return self.server.add_insecure_port(self._address)
            return self.server.add_secure_port(self._address, self._identity.for_server())
        except RuntimeError as error:
            raise AddressTaken(self._address) from error

    async def start(self) -> None:
        """Serves, and says SERVING."""
        await self.server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def retire(self, drain_s: float) -> None:
        """Says NOT_SERVING, and serves on for as long as callers may need to notice and go elsewhere.

        A call that comes when the server has begun to stop is lost: its caller can't know whether it had an effect.
        """
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(drain_s)

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, and gives those under way `grace_s` seconds."""
        await self.server.stop(grace_s)
