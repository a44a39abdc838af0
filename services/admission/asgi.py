"""AdmissionService over ASGI: a gRPC server of unary calls, for a host inside of the gateway.

Before a service of another process stands the gateway's router. What it does there is done here: a
call that takes too long is answered, one whose caller has gone is left, and too many are refused.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from uuid import uuid4

import grpc
import structlog

from services.admission import grpc_wire
from services.admission.calls import KEY_HEADER, Call, Method
from services.admission.grpc_wire import Refused
from services.shared.errors import InvalidRequest, ServiceError, Unavailable
from services.shared.grpc_server import ADDRESS_HEADER, failure_status

log = structlog.get_logger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

# As many as the gateway has under way to a service of another process.
_MAX_CALLS = 10_000
# How often a call that is under way looks whether its caller is still there.
_LOOK_S = 1.0
_KEY_HEADER = KEY_HEADER.encode()
_ADDRESS_HEADER = ADDRESS_HEADER.encode()
# The gateway's transcoder has put it there, and nobody else can.
_REST = b"x-envoy-original-path"


@dataclass(frozen=True, slots=True)
class Served:
    """A method as it is served.

    Args:
        method: answers the calls.
        limit_s: seconds that a call may take.
        late: makes the answer to one that took longer.
    """

    method: Method
    limit_s: float
    late: Callable[[], ServiceError]


class AdmissionApp:
    """The application. Its core is open from `lifespan.startup` to `lifespan.shutdown`, and works in the
    event loop of the calls. If the core can't be opened, or fails later, the process ends: without
    it the gateway would only look alive.

    Args:
        core: opens what answers calls; gives the methods by their gRPC paths.
    """

    def __init__(self, core: Callable[[], AbstractAsyncContextManager[Mapping[str, Served]]]) -> None:
        self._core = core
        self._methods: Mapping[str, Served] = {}
        self._calls: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            async with self._core() as self._methods:
                await send({"type": "lifespan.startup.complete"})
                await receive()
                # Their connections are closed by now.
                for call in self._calls:
                    call.cancel()
                await asyncio.gather(*self._calls, return_exceptions=True)
        except (SystemExit, ServiceError) as error:
            sys.stderr.write(f"admission: {error}\n")
            _end_process()
        except BaseException:
            log.exception("admission_failed")
            _end_process()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Event, receive: Receive, send: Send) -> None:
        call = asyncio.current_task()
        assert call is not None
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1") or str(uuid4())
        structlog.contextvars.bind_contextvars(request_id=request_id, method=scope["path"])
        self._calls.add(call)
        try:
            if not grpc_wire.is_grpc(headers.get(b"content-type", b"")):
                await _send_all(send, grpc_wire.NOT_GRPC)
                return
            answer = await self._answer(scope, headers, receive, call)
        except _CallerLeft:
            return
        except Refused as error:
            await _send_all(send, grpc_wire.error(error.code, error.message, b""))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is logged
            if isinstance(error, asyncio.CancelledError) and call.cancelling():
                # The application ends.
                return
            code, status = failure_status(error, request_id)
            await _send_all(send, grpc_wire.error(code, status.message, status.SerializeToString()))
        else:
            await send(grpc_wire.START)
            await send(grpc_wire.answer(answer))
            await send(grpc_wire.OK)
        finally:
            self._calls.discard(call)

    async def _answer(
        self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive, call: asyncio.Task[Any]
    ) -> bytes:
        served = self._methods.get(scope["path"]) if scope["method"] == "POST" else None
        if served is None:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "no such method")
        if len(self._calls) > _MAX_CALLS:
            raise Unavailable("the service is not available, try again")
        if headers.get(b"te") != b"trailers":
            # Without it the server leaves out the trailers, and so the status.
            raise InvalidRequest("the header `te: trailers` is missing")
        # A header of this name from a caller of REST is none of gRPC's.
        timeout_s = None if _REST in headers else grpc_wire.timeout_s(headers.get(b"grpc-timeout"))
        request = grpc_wire.message(await _body(receive), headers.get(b"grpc-encoding", b""))
        keys = [value.decode("latin-1") for name, value in scope["headers"] if name == _KEY_HEADER]
        if timeout_s == 0:
            raise _deadline_exceeded()
        watch = _Watch(call, served, timeout_s, receive)
        try:
            return await served.method(request, Call(keys, timeout_s, partial(_address, headers)))
        except asyncio.CancelledError:
            if watch.verdict is None:
                raise
            call.uncancel()
            raise watch.verdict from None
        finally:
            watch.end()


def _address(headers: Mapping[bytes, bytes]) -> str:
    return headers[_ADDRESS_HEADER].decode("latin-1")


class _CallerLeft(Exception):
    """Nobody waits for the answer."""


class _Watch:
    """Cancels a call whose time is over or whose caller has gone; the verdict says which.

    That the caller has gone is told to those who ask, and they are answered at once.
    """

    __slots__ = ("_call", "_late", "_loop", "_receive", "_timer", "_until", "verdict")

    def __init__(self, call: asyncio.Task[Any], served: Served, timeout_s: float | None, receive: Receive) -> None:
        self.verdict: Exception | None = None
        self._call = call
        self._receive = receive
        self._loop = call.get_loop()
        # The caller's own deadline, or the gateway's.
        limit_s = served.limit_s
        self._late: Callable[[], Exception] = served.late
        if timeout_s is not None and timeout_s < limit_s:
            limit_s = timeout_s
            self._late = _deadline_exceeded
        self._until = self._loop.time() + limit_s
        self._timer = self._loop.call_later(min(_LOOK_S, limit_s), self._look)

    def end(self) -> None:
        """Nothing is cancelled any more."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._until - self._loop.time()
        if left_s <= 0:
            self._cancel(self._late())
            return
        self._timer = self._loop.call_later(min(_LOOK_S, left_s), self._look)
        asyncio.ensure_future(self._receive()).add_done_callback(self._heard)

    def _heard(self, event: asyncio.Future[Event]) -> None:
        if event.result()["type"] == "http.disconnect" and not self._timer.cancelled():
            self._cancel(_CallerLeft())

    def _cancel(self, verdict: Exception) -> None:
        self._timer.cancel()
        self.verdict = verdict
        self._call.cancel()


def _deadline_exceeded() -> Exception:
    return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")


async def _body(receive: Receive) -> bytes:
    """The request, of which the gateway passes no more on than a message may have."""
    body: bytes = b""
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _CallerLeft
        body += event["body"]
        if not event["more_body"]:
            return body


async def _send_all(send: Send, events: Iterable[Event]) -> None:
    for event in events:
        await send(event)


def _end_process() -> NoReturn:
    # Told by a signal, Envoy would end as if all were well.
    sys.stderr.flush()
    os._exit(1)
