"""Callers that want to wear the gateway out: floods of frames, and whoever is slow on purpose."""

import asyncio
import re
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count, islice, repeat
from pathlib import Path

import pytest
import pytest_asyncio

from services.shared.tls import Certificate
from tests.e2e import http2
from tests.e2e.certificates import make_certificates
from tests.e2e.gateway_process import DEADLINE_S, Gateway, eventually, running_gateway
from tests.e2e.gateway_services import running_services

HELLO = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)
FIELDS = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/health")]
POST = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/engines/a/admit")]
REFUSED_STREAM = struct.pack(">I", http2.REFUSED_STREAM)


def rapid_resets() -> Iterator[bytes]:
    return (
        http2.headers(stream, FIELDS, end=True) + http2.reset(stream, http2.CANCEL) for stream in count(start=1, step=2)
    )


def headers_without_end() -> Iterator[bytes]:
    yield http2.frame(http2.HEADERS, 0, 1, b"\0\1a\1b")
    yield from repeat(http2.frame(http2.CONTINUATION, 0, 1, b"\0\1a\1b" * 16))


def empty_continuations() -> Iterator[bytes]:
    yield http2.frame(http2.HEADERS, 0, 1, b"\0\1a\1b")
    yield from repeat(http2.frame(http2.CONTINUATION, 0, 1))


def empty_data() -> Iterator[bytes]:
    yield http2.headers(1, POST)
    yield from repeat(http2.data(1, b""))


def window_updates() -> Iterator[bytes]:
    yield http2.headers(1, POST)
    yield from repeat(http2.frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)))


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rapid resets": rapid_resets,
    "headers without end": headers_without_end,
    "empty continuations": empty_continuations,
    "pings": lambda: repeat(http2.frame(http2.PING, 0, 0, b"8 octets")),
    "settings": lambda: repeat(http2.frame(http2.SETTINGS, 0, 0)),
    "empty data": empty_data,
    "priorities": lambda: repeat(http2.frame(http2.PRIORITY, 0, 1, struct.pack(">IB", 3, 16))),
    "window updates": window_updates,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with (
        running_services() as services,
        running_gateway(tmp_path_factory.mktemp("gateway"), services.address, services.address) as gateway,
    ):
        yield gateway


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = address.split(":")
    # So that answers which nobody reads come to stand in the gateway, and not in the kernel.
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.setblocking(False)
    await asyncio.get_running_loop().sock_connect(caller, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=caller, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def send_all(writer: asyncio.StreamWriter, frames: Iterator[bytes]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while some := b"".join(islice(frames, 200)):
            writer.write(some)
            await writer.drain()


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Reads until the other side closes."""
    async with asyncio.timeout(DEADLINE_S):
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
    return True


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("flood", FLOODS)
async def test_a_connection_that_floods_is_closed_and_others_notice_nothing(gateway: Gateway, flood: str) -> None:
    frames = FLOODS[flood]()
    async with connected(gateway.address) as (_, writer):
        writer.write(HELLO)
        with pytest.raises(ConnectionError):
            await send_all(writer, islice(frames, 2_000_000))
    assert (await gateway.rest("GET", "/health")).json() == {"status": "ok"}
    assert gateway.process.returncode is None


def shorter(**limits: str) -> Callable[[str], str]:
    """Changes settings of the configuration, each of which is there."""

    def edit(config: str) -> str:
        for name, value in limits.items():
            config, found = re.subn(rf"\b{name}: [1-9][\w.]*", f"{name}: {value}", config)
            assert found, name
        return config

    return edit


async def test_headers_in_http2_that_do_not_end_are_not_waited_for(tmp_path: Path) -> None:
    edit = shorter(request_headers_timeout="0.2s")
    async with (
        running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1", edit) as gateway,
        connected(gateway.address) as (reader, writer),
    ):
        writer.write(HELLO + http2.frame(http2.HEADERS, 0, 1, b"\0\1a\1b"))
        async with asyncio.timeout(DEADLINE_S):
            async for kind, *_ in http2.frames(reader):
                if kind in (http2.RST_STREAM, http2.GOAWAY):
                    return
        assert reader.at_eof()


CHECK_HEALTH = [
    (":method", "POST"), (":scheme", "http"), (":authority", "a"),
    (":path", "/september.admission.v1.AdmissionService/CheckHealth"),
    ("content-type", "application/grpc"), ("te", "trailers"),
]  # fmt: skip
NO_WINDOW = struct.pack(">HI", 4, 0)


@pytest.mark.parametrize(
    "request_",
    [
        http2.headers(1, [*FIELDS[:3], (":path", "/nowhere")], end=True),
        http2.headers(1, CHECK_HEALTH) + http2.data(1, bytes(5), end=True),
    ],
    ids=["an error", "a message"],
)
async def test_an_answer_that_is_not_read_is_not_kept(tmp_path: Path, request_: bytes) -> None:
    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, shorter(stream_flush_timeout="0.2s")) as gateway,
        connected(gateway.address) as (reader, writer),
    ):
        writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, NO_WINDOW) + request_)
        kinds = []
        async with asyncio.timeout(DEADLINE_S):
            async for kind, _, stream, _ in http2.frames(reader):
                kinds += [kind] if stream == 1 else []
                if kind == http2.RST_STREAM:
                    break
        assert kinds == [http2.HEADERS, http2.RST_STREAM]


async def test_more_streams_than_a_connection_may_have_are_refused(tmp_path: Path) -> None:
    edit = shorter(max_concurrent_streams="2", request_timeout="30s")
    async with (
        running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1", edit) as gateway,
        connected(gateway.address) as (reader, writer),
    ):
        writer.write(HELLO + b"".join(http2.headers(stream, POST) for stream in (1, 3, 5)))
        async with asyncio.timeout(DEADLINE_S):
            async for kind, _, stream, payload in http2.frames(reader):
                if kind in (http2.RST_STREAM, http2.GOAWAY):
                    assert (kind, stream, payload) == (http2.RST_STREAM, 5, REFUSED_STREAM)
                    break


async def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1", shorter(idle_timeout="0.2s")) as gateway,
        connected(gateway.address) as (reader, _),
    ):
        assert await is_closed(reader)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
async def test_a_handshake_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    certificate = Certificate(tmp_path / "public.pem", tmp_path / "public.key")
    edit = shorter(transport_socket_connect_timeout="0.2s")

    def edit_config(text: str) -> str:
        return edit(text) if "transport_socket_connect_timeout" in text else text

    async with (
        running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1", edit_config, certificate=certificate) as gateway,
        connected(gateway.address) as (reader, _),
    ):
        assert await is_closed(reader)


async def test_operators_are_served_when_all_connections_are_taken(tmp_path: Path) -> None:
    edit = shorter(max_active_downstream_connections="3")
    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, edit) as gateway,
    ):
        taken = [await asyncio.open_connection(*gateway.address.split(":")) for _ in range(3)]

        async def refused() -> bool:
            try:
                await gateway.rest("GET", "/health")
            except (ConnectionError, asyncio.IncompleteReadError):
                return True
            return False

        await eventually(refused)
        for _ in range(3):
            assert (await gateway.rest("GET", "/products")).status == 200
        # And have made no room for products.
        assert await refused()
        for _, writer in taken:
            writer.close()


async def test_short_of_memory_the_gateway_says_when_to_try_again(tmp_path: Path) -> None:
    def full(config: str) -> str:
        # Connections are still taken, or nobody could be told.
        config = re.sub(r" *- name: envoy.overload_actions.stop_accepting_connections\n.*\n", "", config)
        return shorter(max_heap_size_bytes="1")(config)

    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, full) as gateway,
    ):

        async def refused() -> tuple[int, str, str] | None:
            # A connection that has just been opened may be closed before it is told why.
            with suppress(ConnectionError):
                answer = await gateway.rest("GET", "/health")
                return answer.own_error() if answer.status != 200 and answer.header("retry-after") == "1" else None
            return None

        assert (await eventually(refused))[:2] == (503, "UNAVAILABLE")
