"""gRPC's and HTTP/2's own framing, byte by byte, against both gateways."""

import asyncio
import struct
from collections.abc import Iterator
from contextlib import suppress
from random import Random

import hpack

from tests.e2e import http2
from tests.fuzz.streams import Stream
from tests.fuzz.targets import DEADLINE_S, Tally, Targets, Verdict

_STREAMS = 50
_CONNECTIONS = 4
_GOAWAY, _CONTINUATION, _PING, _PRIORITY, _PUSH_PROMISE, _WINDOW_UPDATE = 7, 9, 6, 2, 5, 8
# UNKNOWN, INTERNAL, UNAVAILABLE, DATA_LOSS: nothing of what a caller can do.
_FAILURES = {"2", "13", "14", "15"}
# With which gRPC, and the gateway, refuse framings and encodings that are none; gRPC has no other code for that.
_REFUSALS = (
    "the request is malformed or did not arrive in time",
    "the message is compressed, but grpc-encoding does not say how",
    "Compression bit set but no encoding configured",
    "Decompression failed",
    "Error parsing 'grpc-encoding' metadata",
    "Error parsing 'grpc-timeout' metadata",
)


def feed(runner: asyncio.Runner, targets: Targets, tally: Tally, number: int, seed: int) -> None:
    """Makes about so many streams of framed messages, and a tenth as many connections of broken HTTP/2."""
    random = Random(seed)
    each = number // len(targets.listeners)
    streams = [Stream(random, targets) for _ in range(each * 9 // 10)]
    broken = [_connection(random, targets) for _ in range(each - len(streams))]

    async def send() -> None:
        async with asyncio.TaskGroup() as group:
            for address in targets.listeners:
                batches = (streams[i : i + _STREAMS] for i in range(0, len(streams), _STREAMS))
                connections = iter(broken)
                for _ in range(_CONNECTIONS):
                    group.create_task(_send_streams(address, batches, tally))
                    group.create_task(_send_connections(address, connections, tally))

    runner.run(send())


async def _send_streams(address: str, batches: Iterator[list[Stream]], tally: Tally) -> None:
    for batch in batches:
        try:
            async with asyncio.timeout(DEADLINE_S):
                verdicts = await _answers(address, batch)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            verdicts = [Verdict(f"{error!r} of {address}", False)] * len(batch)
        for stream, verdict in zip(batch, verdicts, strict=True):
            tally.count(verdict, stream)


async def _answers(address: str, batch: list[Stream]) -> list[Verdict]:
    """Sends every stream on one connection, and judges each answer."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
        frames = http2.frames(reader)
        # Before it there is no room for all bodies.
        while (await anext(frames))[0] != _WINDOW_UPDATE:
            pass
        writer.write(b"".join(stream.frames(2 * i + 1) for i, stream in enumerate(batch)))
        answers: list[dict[str, str]] = [{} for _ in batch]
        open_ = set(range(len(batch)))
        decoder = hpack.Decoder()
        async for kind, flags, stream, payload in frames:
            if kind == _GOAWAY:
                break
            if not stream:
                continue
            index = stream // 2
            if kind == http2.HEADERS:
                assert flags & http2.END_HEADERS
                answers[index] |= {str(name): str(value) for name, value in decoder.decode(payload)}
            elif kind == http2.RST_STREAM:
                answers[index].setdefault("reset", payload.hex())
            if kind == http2.RST_STREAM or (kind in (http2.DATA, http2.HEADERS) and flags & http2.END_STREAM):
                open_.discard(index)
                if not open_:
                    break
        return [
            Verdict(f"no answer of {address}", False) if i in open_ else _verdict(answer, address)
            for i, answer in enumerate(answers)
        ]
    finally:
        writer.transport.abort()


def _verdict(answer: dict[str, str], address: str) -> Verdict:
    if not answer.get(":status", "5").startswith("5"):
        status = answer.get("grpc-status")
        # Not gRPC at all, and answered as REST.
        if status is None and answer[":status"].startswith("4"):
            return Verdict(None, True)
        if status is not None and (status not in _FAILURES or answer.get("grpc-message", "").startswith(_REFUSALS)):
            return Verdict(None, status != "0")
    return Verdict(f"{answer} of {address}", False)


def _connection(random: Random, targets: Targets) -> bytes:
    """Frames that are none, in an order that is wrong, of sizes that are not allowed."""
    sent = http2.PREFACE if random.randrange(20) else http2.PREFACE[: random.randrange(24)]
    if random.randrange(10):
        sent += http2.frame(http2.SETTINGS, 0, 0)
    stream = 1
    for _ in range(random.randrange(1, 8)):
        sent += _frames(random, targets, stream)
        stream += random.choice([0, 2, 2])
    return sent


def _frames(random: Random, targets: Targets, stream: int) -> bytes:
    call = Stream(random, targets).frames(stream)
    payload = random.randbytes(random.choice([0, 1, 4, 5, 6, 8, 100]))
    setting = struct.pack(">HI", random.randrange(9), random.choice([0, 1, 2**14, 2**32 - 1]))
    window = struct.pack(">I", random.choice([0, 1, 2**31 - 1]))
    path = random.choice(["", "a", "*", "/\x7f", "/é"])
    anywhere = random.choice([0, stream, 2, 2**31 - 1])
    return random.choice(
        [
            call,
            call[: random.randrange(len(call))],
            http2.frame(random.randrange(256), random.randrange(256), anywhere, payload),
            http2.frame(http2.SETTINGS, 0, 0, setting),
            http2.frame(_WINDOW_UPDATE, 0, random.choice([0, stream]), window),
            http2.frame(_PING, 0, 0, b"\0" * random.choice([8, 7])) * random.choice([1, 500]),
            http2.frame(_PRIORITY, 0, stream, b"\0\0\0\1\1") * random.choice([1, 200]),
            http2.frame(_PUSH_PROMISE, 4, stream, payload),
            http2.frame(_CONTINUATION, 4, stream, payload),
            # A head without an end.
            http2.frame(http2.HEADERS, 0, stream) + http2.frame(_CONTINUATION, 0, stream, b"\0\1a\1b") * 300,
            http2.headers(stream, [(":method", "POST"), (":path", path), ("x y", "\0")]),
            http2.headers(stream, [(":path", "/health"), (":path", "/status"), ("transfer-encoding", "x")], end=True),
            http2.headers(stream, [("x_y", "1"), (":method", "GET")] * 40, end=True),
            # Numbers of HPACK without an end.
            http2.frame(http2.HEADERS, 5, stream, b"\x3f\xff\xff\xff\xff\xff\x7f"),
            http2.frame(http2.HEADERS, 5, stream, b"\xff\xff\xff\xff\xff\x0f"),
            http2.headers(stream, [(":method", "GET")]) + http2.reset(stream, http2.CANCEL),
            b"\xff\xff\xff\0\0" + struct.pack(">I", stream),
            http2.frame(_GOAWAY, 0, 0, b"\0" * 8),
        ]
    )


async def _send_connections(address: str, connections: Iterator[bytes], tally: Tally) -> None:
    """Whatever comes of them: afterwards the gateway answers as if nothing had been."""
    host, port = address.split(":")
    for connection in connections:
        try:
            async with asyncio.timeout(DEADLINE_S):
                with suppress(ConnectionError):
                    reader, writer = await asyncio.open_connection(host, int(port))
                    try:
                        writer.write(connection)
                        await reader.read(1)
                    finally:
                        writer.transport.abort()
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(b"GET /nowhere HTTP/1.1\r\nhost: a\r\n\r\n")
                    healthy = (await reader.readline()).startswith(b"HTTP/1.1 404 ")
                finally:
                    writer.transport.abort()
            tally.count(Verdict(None if healthy else "the gateway is not well", False), connection)
        except TimeoutError:
            tally.count(Verdict(f"no answer within {DEADLINE_S} s", False), connection)
        except ConnectionError as error:
            tally.count(Verdict(f"the gateway is not well: {error!r}", False), connection)
