"""What gRPC servers never send, and what HTTP/2 callers of REST see: tests on the frames themselves."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hpack import Decoder

from september.admission.v1 import admission_service_pb2 as admission_pb
from tests.e2e import http2
from tests.e2e.gateway_process import DEADLINE_S, RESPONSE_HEADERS, running_gateway
from tests.e2e.gateway_services import engine

UNAVAILABLE = (503, "UNAVAILABLE", "the service is not available, try again")
POST_ADMIT = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/engines/a/admit")]
HEALTH = "/grpc.health.v1.Health/Check"
# The health service's answer SERVING, in its frame.
HEALTHY = b"\0\0\0\0\2\x08\x01"
OK_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


def message() -> bytes:
    """A gRPC message with an admit's success."""
    serialized = admission_pb.AdmitResponse(admitted=True, engine=engine("a")).SerializeToString()
    return struct.pack(">BI", 0, len(serialized)) + serialized


def whole(status: str, content_type: str, body: bytes) -> Callable[[int], bytes]:
    def answer(stream: int) -> bytes:
        fields = [(":status", status), ("content-type", content_type), ("x-inside", "1"), ("location", "http://inside")]
        return http2.headers(stream, fields) + http2.data(stream, body, end=True)

    return answer


def grpc_answer(payload: bytes, *trailers: tuple[str, str]) -> Callable[[int], bytes]:
    def answer(stream: int) -> bytes:
        return (
            http2.headers(stream, OK_HEADERS) + http2.data(stream, payload) + http2.headers(stream, trailers, end=True)
        )

    return answer


def only_headers(*fields: tuple[str, str]) -> Callable[[int], bytes]:
    return lambda stream: http2.headers(stream, [*OK_HEADERS, *fields], end=True)


@dataclass
class Upstream:
    """A service that answers its calls with these bytes, one after the other, and is healthy whatever it answers."""

    answers: Sequence[Callable[[int], bytes]]
    address: str = ""
    calls: int = 0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        await reader.readexactly(len(http2.PREFACE))
        writer.write(http2.frame(http2.SETTINGS, 0, 0))
        decoder, looks = Decoder(), set()
        async for kind, flags, stream, payload in http2.frames(reader):
            if kind == http2.HEADERS and HEALTH in {str(value) for _, value in decoder.decode(payload)}:
                looks.add(stream)
            if kind in (http2.HEADERS, http2.DATA) and flags & http2.END_STREAM:
                if stream in looks:
                    writer.write(grpc_answer(HEALTHY, ("grpc-status", "0"))(stream))
                    continue
                self.calls += 1
                answer = self.answers[min(self.calls, len(self.answers)) - 1](stream)
                if not answer:
                    break
                writer.write(answer)
        writer.close()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def answering(*answers: Callable[[int], bytes]) -> AsyncIterator[Upstream]:
    """Answers the first call with the first, and so on; the last one stays. An empty answer closes the connection."""
    upstream = Upstream(answers)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield upstream
    finally:
        server.close()
        upstream.close()
        await server.wait_closed()


async def test_a_refused_stream_is_tried_again(tmp_path: Path) -> None:
    def refuse(stream: int) -> bytes:
        return http2.reset(stream, http2.REFUSED_STREAM)

    async with (
        answering(refuse, grpc_answer(message(), ("grpc-status", "0"))) as upstream,
        running_gateway(tmp_path, upstream.address, "127.0.0.1:1") as gateway,
    ):
        assert (await gateway.rest("POST", "/engines/a/admit")).json()["admitted"] is True
        assert upstream.calls == 2


@pytest.mark.parametrize(
    "answer",
    [lambda stream: http2.reset(stream, http2.CANCEL), lambda stream: b""],
    ids=["reset", "closed connection"],
)
async def test_a_call_that_may_have_had_an_effect_is_not_tried_again(
    tmp_path: Path, answer: Callable[[int], bytes]
) -> None:
    async with answering(answer) as upstream, running_gateway(tmp_path, upstream.address, "127.0.0.1:1") as gateway:
        assert (await gateway.rest("POST", "/engines/a/admit")).own_error() == UNAVAILABLE
        assert upstream.calls == 1


NO_ANSWERS = {
    "only headers, status OK": only_headers(("grpc-status", "0")),
    "message, then an error": grpc_answer(message(), ("grpc-status", "13"), ("grpc-message", "secret")),
    "message, then no status": grpc_answer(message(), ("x-inside", "1")),
    "undecodable message": grpc_answer(b"\0\0\0\0\3\x0a\1a", ("grpc-status", "0")),
    "html": whole("200", "text/html", b"<p>secret"),
    "json": whole("200", "application/problem+json", b'{"x":"secret"}'),
    "redirect": whole("302", "text/plain", b"secret"),
    "not found": whole("404", "text/plain", b"secret"),
    "bad gateway": whole("502", "text/html", b"secret"),
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
async def test_an_answer_that_is_no_answer_is_an_internal_error(tmp_path: Path, answer: Callable[[int], bytes]) -> None:
    async with answering(answer) as upstream, running_gateway(tmp_path, upstream.address, "127.0.0.1:1") as gateway:
        status, code, text = (await gateway.rest("POST", "/engines/a/admit")).own_error()
        assert (status, code) == (500, "INTERNAL")
        assert "secret" not in text


@pytest.mark.parametrize("name", [name for name in NO_ANSWERS if "message" not in name and "headers" not in name])
async def test_a_watch_without_an_answer_is_an_error(tmp_path: Path, name: str) -> None:
    async with (
        answering(NO_ANSWERS[name]) as upstream,
        running_gateway(tmp_path, "127.0.0.1:1", upstream.address) as gateway,
    ):
        error = (await gateway.rest("GET", "/engines/a/watch")).own_error()
        assert error[:2] in ((500, "INTERNAL"), (503, "UNAVAILABLE"))
        assert "secret" not in error[2]


@pytest.mark.parametrize("name", ["message, then an error", "message, then no status"])
async def test_a_watch_without_a_status_at_its_end_breaks_off(tmp_path: Path, name: str) -> None:
    async with (
        answering(NO_ANSWERS[name]) as upstream,
        running_gateway(tmp_path, "127.0.0.1:1", upstream.address) as gateway,
        gateway.lines("/engines/a/watch") as answer,
    ):
        lines = aiter(answer)
        await anext(lines)
        with pytest.raises(asyncio.IncompleteReadError):
            await anext(lines)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/engines/a/admit"), ("GET", "/engines"), ("POST", "/engines/a/stop")]
)
async def test_success_without_a_message_is_no_success(tmp_path: Path, method: str, path: str) -> None:
    async with (
        answering(grpc_answer(b"", ("grpc-status", "0"), ("x-inside", "1"))) as upstream,
        running_gateway(tmp_path, upstream.address, upstream.address) as gateway,
    ):
        answer = await gateway.rest(method, path)
        # Envoy gives the script no body to fill here.
        assert (answer.status, answer.body) == (500, b"")
        assert {name for name, _ in answer.headers} <= RESPONSE_HEADERS


async def http2_answers(address: str, request: bytes, stream: int) -> dict[int, list[bytes]]:
    """Sends frames; the payloads of the HEADERS and DATA frames that answer the stream."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + request)
    answered: dict[int, list[bytes]] = {http2.HEADERS: [], http2.DATA: []}
    async with asyncio.timeout(DEADLINE_S):
        async for kind, flags, answered_stream, payload in http2.frames(reader):
            if kind in answered and answered_stream == stream:
                answered[kind].append(payload)
                if flags & http2.END_STREAM:
                    break
    writer.close()
    await writer.wait_closed()
    return answered


@pytest.mark.parametrize("status", ["0", "9"])
async def test_an_http2_caller_of_rest_gets_no_trailers(tmp_path: Path, status: str) -> None:
    def answer(stream: int) -> bytes:
        trailers = [("grpc-status", status), ("x-inside", "1")]
        first = http2.headers(stream, OK_HEADERS) + (http2.data(stream, message()) if status == "0" else b"")
        return first + http2.headers(stream, trailers, end=True)

    async with answering(answer) as upstream, running_gateway(tmp_path, upstream.address, "127.0.0.1:1") as gateway:
        answered = await http2_answers(gateway.address, http2.headers(1, POST_ADMIT, end=True), 1)
    # A second HEADERS frame would be the trailers.
    assert len(answered[http2.HEADERS]) == 1
    assert list(json.loads(b"".join(answered[http2.DATA]))) == (["admitted", "engine"] if status == "0" else ["error"])


async def test_a_malformed_http2_request_does_not_cost_the_others_their_connection(tmp_path: Path) -> None:
    async with (
        answering(grpc_answer(message(), ("grpc-status", "0"))) as upstream,
        running_gateway(tmp_path, upstream.address, "127.0.0.1:1") as gateway,
    ):
        malformed = http2.headers(1, [*POST_ADMIT, ("Upper-Case", "x")], end=True)
        answered = await http2_answers(gateway.address, malformed + http2.headers(3, POST_ADMIT, end=True), 3)
        assert json.loads(b"".join(answered[http2.DATA]))["admitted"] is True
        assert upstream.calls == 1
