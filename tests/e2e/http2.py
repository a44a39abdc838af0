"""HTTP/2 frame by frame, for what no library would send or show."""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
REFUSED_STREAM, CANCEL = 7, 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(stream: int, fields: Iterable[tuple[str, str]], *, end: bool = False) -> bytes:
    """A HEADERS frame whose fields are literals without indexing, which need no table."""
    block = b"".join(b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in field) for field in fields)
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)


def data(stream: int, payload: bytes, *, end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of every frame, until the connection closes."""
    while head := await reader.read(9):
        head += await reader.readexactly(9 - len(head))
        size, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], head[5:]
        yield kind, flags, int.from_bytes(stream, "big"), await reader.readexactly(size)
