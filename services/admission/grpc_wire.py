"""gRPC of unary calls as HTTP/2 carries it: messages, timeouts, statuses. As gRPC's own
`PROTOCOL-HTTP2` has it, and as the servers of `grpc.aio` read it."""

import re
import zlib
from binascii import b2a_base64
from typing import Any
from urllib.parse import quote

import grpc

from services.shared.errors import InvalidRequest
from services.shared.grpc_server import MAX_REQUEST_BYTES

_PREFIX_BYTES = 5
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# By the window bits that tell zlib the format.
_ENCODINGS = {b"gzip": 31, b"deflate": 15}
# In a message all else is escaped, and so is the sign of an escape.
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

_CONTENT_TYPE = (b"content-type", b"application/grpc")

# The events of an answer; between the first two and the last comes the message.
START: dict[str, Any] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [_CONTENT_TYPE],
    "trailers": True,
}
OK: dict[str, Any] = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}
_NO_MESSAGE: dict[str, Any] = {"type": "http.response.body", "body": b""}
# To what is not gRPC at all.
NOT_GRPC = ({"type": "http.response.start", "status": 415, "headers": []}, _NO_MESSAGE)


class Refused(Exception):
    """An error of gRPC itself, without an entry in the error table."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def is_grpc(content_type: bytes) -> bool:
    return content_type == b"application/grpc" or content_type.startswith((b"application/grpc+", b"application/grpc;"))


def timeout_s(header: bytes | None) -> float | None:
    """The seconds of a `grpc-timeout`; None without one.

    Raises:
        InvalidRequest: it is malformed.
    """
    if header is None:
        return None
    parts = _TIMEOUT.fullmatch(header)
    if parts is None:
        raise InvalidRequest("grpc-timeout is malformed")
    return int(parts[1]) * _UNITS_S[parts[2]]


def message(body: bytes, encoding: bytes) -> bytes:
    """The one message of a request.

    Args:
        body: of the request, all of it.
        encoding: its `grpc-encoding`; empty if it has none.

    Raises:
        InvalidRequest: the body is not exactly one message.
        Refused: it is too large, or encoded in a way that is not known.
    """
    content = body[_PREFIX_BYTES:]
    size = int.from_bytes(body[1:_PREFIX_BYTES], "big")
    if size > MAX_REQUEST_BYTES:
        raise _too_large()
    if len(body) < _PREFIX_BYTES or size != len(content) or body[0] > 1:
        raise InvalidRequest("the message is malformed")
    return _decompressed(content, encoding) if body[0] else content


def _decompressed(content: bytes, encoding: bytes) -> bytes:
    if encoding in (b"", b"identity"):
        raise Refused(grpc.StatusCode.INTERNAL, "the message is compressed, but grpc-encoding does not say how")
    window_bits = _ENCODINGS.get(encoding)
    if window_bits is None:
        raise Refused(grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding is not supported")
    decompressor = zlib.decompressobj(window_bits)
    try:
        # No more is made of it than tells that it is too large.
        decompressed = decompressor.decompress(content, MAX_REQUEST_BYTES + 1)
    except zlib.error as error:
        raise InvalidRequest("the message is malformed") from error
    if len(decompressed) > MAX_REQUEST_BYTES:
        raise _too_large()
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequest("the message is malformed")
    return decompressed


def _too_large() -> Refused:
    return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "the message is over 64 KiB")


def answer(content: bytes) -> dict[str, Any]:
    """The event of an answer's message."""
    return {"type": "http.response.body", "body": b"\0" + len(content).to_bytes(4, "big") + content}


def error(code: grpc.StatusCode, text: str, details: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The events of an answer that is an error, all of it in its headers.

    Args:
        code: gRPC's.
        text: the message.
        details: a `google.rpc.Status`, or empty.
    """
    headers = [
        _CONTENT_TYPE,
        (b"grpc-status", b"%d" % code.value[0]),
        (b"grpc-message", quote(text, safe=_PRINTABLE).encode()),
        (b"grpc-accept-encoding", b"identity,deflate,gzip"),
    ]
    if details:
        headers.append((b"grpc-status-details-bin", b2a_base64(details, newline=False).rstrip(b"=")))
    return {"type": "http.response.start", "status": 200, "headers": headers}, _NO_MESSAGE
