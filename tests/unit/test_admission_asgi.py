"""Admission's gRPC over ASGI: what a caller may send, what may go wrong in a call, and how the application lives."""

import asyncio
import base64
import gzip
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from urllib.parse import unquote

import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from services.admission import asgi
from services.admission.asgi import AdmissionApp, Event, Served
from services.admission.calls import Call
from services.shared.errors import BootTimeout, RateLimited

METHOD = "/september.admission.v1.AdmissionService/Admit"
GRPC = {"content-type": "application/grpc", "te": "trailers"}
DEADLINE_S = 10.0
Method = Callable[[bytes, Call], Awaitable[bytes]]


def frame(content: bytes, flag: int = 0, size: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(content) if size is None else size) + content


async def echo(request: bytes, call: Call) -> bytes:
    return request


class Caller:
    """A caller of an application that is open: one request, in these parts, and what comes of it."""

    def __init__(self, app: AdmissionApp, headers: list[tuple[str, str]], parts: list[bytes], path: str) -> None:
        self.left = False
        self.sent: list[Event] = []
        self._parts = parts
        self._app = app
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }

    async def __call__(self, verb: str = "POST") -> None:
        self._scope["method"] = verb
        async with asyncio.timeout(DEADLINE_S):
            # A task of its own, as in the host.
            await asyncio.create_task(self._app(self._scope, self._receive, self._send))

    async def _receive(self) -> Event:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        return {"type": "http.disconnect"} if self.left else {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, event: Event) -> None:
        self.sent.append(event)

    @property
    def status(self) -> dict[str, str]:
        """The headers or trailers with the status of gRPC."""
        fields = [field for event in self.sent for field in event.get("headers", ())]
        return {name.decode(): value.decode() for name, value in fields if name.startswith(b"grpc-")}

    @property
    def answer(self) -> tuple[int, str]:
        """Code and message."""
        return int(self.status["grpc-status"]), unquote(self.status.get("grpc-message", ""))

    @property
    def reason(self) -> str:
        """The reason in the details."""
        details = self.status["grpc-status-details-bin"]
        status = Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
        info = ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (status.code, status.message) == self.answer
        return info.reason


@asynccontextmanager
async def opened(method: Method, limit_s: float = 60) -> AsyncIterator[Callable[..., Caller]]:
    """An application that serves one method; makes callers."""

    @asynccontextmanager
    async def core() -> AsyncIterator[Mapping[str, Served]]:
        yield {METHOD: Served(method, limit_s, lambda: BootTimeout("late"))}

    app = AdmissionApp(core)
    events: asyncio.Queue[Event] = asyncio.Queue()
    sent: asyncio.Queue[Event] = asyncio.Queue()
    events.put_nowait({"type": "lifespan.startup"})
    life = asyncio.create_task(app({"type": "lifespan"}, events.get, sent.put))
    assert await sent.get() == {"type": "lifespan.startup.complete"}

    def caller(
        *parts: bytes, headers: Mapping[str, str] | None = None, keys: list[str] | None = None, path: str = METHOD
    ) -> Caller:
        fields = [*{**GRPC, **(headers or {})}.items(), *(("x-platform-key", key) for key in keys or [])]
        return Caller(app, fields, list(parts) or [frame(b"")], path)

    yield caller
    events.put_nowait({"type": "lifespan.shutdown"})
    assert await asyncio.wait_for(sent.get(), DEADLINE_S) == {"type": "lifespan.shutdown.complete"}
    await life


async def test_a_message_is_answered_with_a_message_and_a_status_in_trailers() -> None:
    async with opened(echo) as caller:
        call = caller(frame(b"hello"))
        await call()
    assert call.sent == [
        {
            "type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/grpc")],
            "trailers": True,
        },
        {"type": "http.response.body", "body": frame(b"hello")},
        {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]},
    ]  # fmt: skip


async def test_an_error_is_all_in_headers() -> None:
    async with opened(echo) as caller:
        call = caller(path="/other")
        await call()
    start, body = call.sent
    assert (start["type"], start["status"], "trailers" in start) == ("http.response.start", 200, False)
    assert body == {"type": "http.response.body", "body": b""}
    assert call.answer == (12, "no such method")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_message_is_read(encoding: str) -> None:
    compressed = gzip.compress(b"hello") if encoding == "gzip" else zlib.compress(b"hello")
    async with opened(echo) as caller:
        call = caller(frame(compressed, 1), headers={"grpc-encoding": encoding})
        await call()
    assert call.sent[1]["body"] == frame(b"hello")


async def test_a_request_in_parts_is_read_whole() -> None:
    async with opened(echo) as caller:
        call = caller(b"\0\0", b"\0\0\5h", b"", b"ello")
        await call()
    assert call.sent[1]["body"] == frame(b"hello")


NOT_SAID_HOW = (13, "the message is compressed, but grpc-encoding does not say how")
MALFORMED = (3, "the message is malformed")
TOO_LARGE = (8, "the message is over 64 KiB")
GZIP = {"grpc-encoding": "gzip"}


@pytest.mark.parametrize(
    ("body", "headers", "answer"),
    [
        (b"", {}, MALFORMED),
        (b"\0\0\0\0", {}, MALFORMED),
        (frame(b"a", size=2), {}, MALFORMED),
        (frame(b"ab", size=1), {}, MALFORMED),
        (frame(b"a") + frame(b"b"), {}, MALFORMED),
        (frame(b"a", 2), {}, MALFORMED),
        (frame(b"a", 255), GZIP, MALFORMED),
        (frame(b"a" * 65_537), {}, TOO_LARGE),
        (frame(b"a", size=2**32 - 1), {}, TOO_LARGE),
        (frame(gzip.compress(b"a" * 65_537, mtime=0), 1), GZIP, TOO_LARGE),
        (frame(gzip.compress(bytes(50_000_000), mtime=0), 1), GZIP, TOO_LARGE),
        (frame(b"not gzip", 1), GZIP, MALFORMED),
        (frame(gzip.compress(b"a", mtime=0)[:-1], 1), GZIP, MALFORMED),
        (frame(gzip.compress(b"a", mtime=0) + b"b", 1), GZIP, MALFORMED),
        (frame(b"a", 1), {}, NOT_SAID_HOW),
        (frame(b"a", 1), {"grpc-encoding": "identity"}, NOT_SAID_HOW),
        (frame(b"a", 1), {"grpc-encoding": "br"}, (12, "grpc-encoding is not supported")),
        (frame(b"a"), {"te": ""}, (3, "the header `te: trailers` is missing")),
        (frame(b"a"), {"grpc-timeout": "soon"}, (3, "grpc-timeout is malformed")),
        (frame(b"a"), {"grpc-timeout": "123456789S"}, (3, "grpc-timeout is malformed")),
        (frame(b"a"), {"grpc-timeout": "1s"}, (3, "grpc-timeout is malformed")),
        (frame(b"a"), {"grpc-timeout": "0n"}, (4, "the deadline has passed")),
    ],
)  # fmt: skip
async def test_a_request_that_is_not_one_message_is_refused(
    body: bytes, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    async with opened(echo) as caller:
        call = caller(body, headers=headers)
        await call()
    assert call.answer == answer
    assert call.status["grpc-accept-encoding"] == "identity,deflate,gzip"


async def test_a_message_of_64_kib_is_read() -> None:
    async with opened(echo) as caller:
        call = caller(frame(b"a" * 65_536))
        await call()
    assert len(call.sent[1]["body"]) == 65_541


async def test_what_is_no_grpc_gets_an_error_of_http() -> None:
    async with opened(echo) as caller:
        for content_type in ("", "application/json", "application/grpc-web", "application/grpcx"):
            call = caller(headers={"content-type": content_type})
            await call()
            assert call.sent[0]["status"] == 415
        for content_type in ("application/grpc", "application/grpc+proto", "application/grpc;x=y"):
            call = caller(headers={"content-type": content_type})
            await call()
            assert call.answer == (0, "")
        call = caller()
        await call("GET")
        assert call.answer == (12, "no such method")


@pytest.mark.parametrize(
    ("header", "timeout_s"),
    [(None, None), ("1H", 3600), ("2M", 120), ("30S", 30), ("400m", 0.4), ("9000000u", 9), ("99999999n", 0.099999999)],
)
async def test_the_method_learns_how_long_the_caller_waits_and_every_key(
    header: str | None, timeout_s: float | None
) -> None:
    calls = []

    async def noted(request: bytes, call: Call) -> bytes:
        calls.append(call)
        return b""

    async with opened(noted) as caller:
        await caller(headers={"grpc-timeout": header} if header else {}, keys=["one", "two"])()
    (call,) = calls
    assert list(call.platform_keys) == ["one", "two"]
    assert call.timeout_s == (None if timeout_s is None else pytest.approx(timeout_s))


async def test_an_error_of_the_table_has_its_code_message_and_details() -> None:
    async def limited(request: bytes, call: Call) -> bytes:
        raise RateLimited("100%, größer\n", retry_after_s=1.5)

    async with opened(limited) as caller:
        call = caller()
        await call()
    assert call.status["grpc-message"] == "100%25, gr%C3%B6%C3%9Fer%0A"
    assert call.answer == (8, "100%, größer\n")
    assert call.reason == "RATE_LIMITED"


@pytest.mark.parametrize("error", [RuntimeError("secret"), asyncio.CancelledError("secret")])
async def test_a_bug_shows_nothing_but_the_request_id(error: BaseException) -> None:
    async def broken(request: bytes, call: Call) -> bytes:
        raise error

    async with opened(broken) as caller:
        call = caller(headers={"x-request-id": "r-1"})
        await call()
    assert call.answer == (13, "internal error; request id r-1")
    assert call.reason == "INTERNAL"


class Waiting:
    """A method that never answers; knows when it is called, and when that is over."""

    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: bytes, call: Call) -> bytes:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        raise AssertionError


async def test_a_call_ends_at_the_deadline_of_its_caller() -> None:
    waiting = Waiting()
    async with opened(waiting) as caller:
        call = caller(headers={"grpc-timeout": "20m"})
        await call()
    assert call.answer == (4, "the deadline has passed")
    assert "grpc-status-details-bin" not in call.status
    assert waiting.ended.is_set()


async def test_a_call_ends_at_the_limit_of_its_method() -> None:
    waiting = Waiting()
    async with opened(waiting, limit_s=0.02) as caller:
        call = caller(headers={"grpc-timeout": "1H"})
        await call()
    assert call.answer == (4, "late")
    assert call.reason == "BOOT_TIMEOUT"
    assert waiting.ended.is_set()


async def test_a_call_whose_caller_has_gone_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_LOOK_S", 0.01)
    waiting = Waiting()
    async with opened(waiting) as caller:
        call = caller()
        calling = asyncio.create_task(call())
        await waiting.begun.wait()
        call.left = True
        await calling
        assert waiting.ended.is_set()
    assert call.sent == []


async def test_more_calls_than_it_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_MAX_CALLS", 2)
    waiting = Waiting()
    async with opened(waiting) as caller:
        under_way = [asyncio.create_task(caller()()) for _ in range(2)]
        await waiting.begun.wait()
        refused = caller()
        await refused()
        assert refused.answer == (14, "the service is not available, try again")
        assert refused.reason == "UNAVAILABLE"
        # The end of the application ends them.
    await asyncio.gather(*under_way)
