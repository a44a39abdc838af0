"""Streams of single calls in gRPC's framing, most of them wrongly framed."""

import gzip
import struct
import zlib
from itertools import pairwise
from random import Random

from september.admission.v1 import admission_service_pb2 as pb
from tests.e2e import http2
from tests.fuzz.targets import Targets

_BOMB = gzip.compress(b"\0" * 2**20, mtime=0)
_PATHS = [
    "/september.admission.v1.AdmissionService/Admit",
    "/september.admission.v1.AdmissionService/GetEngine",
    "/september.admission.v1.AdmissionService/CheckHealth",
    "/september.provisioner.v1.ProvisionerService/StartEngine",
    "/september.provisioner.v1.FleetService/ListEngines",
    "/september.provisioner.v1.ProductService/GetProduct",
    "/september.provisioner.v1.ProvisionerService/WatchEngine",
]


class Stream:
    """A stream of one call: its headers and body, as payloads of frames."""

    def __init__(self, random: Random, targets: Targets) -> None:
        path = random.choice(_PATHS)
        # A watch of an engine that there is does not end.
        user_id = targets.user_id if random.randrange(3) and "Watch" not in path else "bob"
        self.fields = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", path), *targets.headers]
        if random.randrange(20):
            self.fields.append(("te", "trailers"))
        self.fields.append(
            ("content-type", random.choice(["application/grpc", "application/grpc+proto", "application/grpc;x"]))
        )
        encoding = random.choice([None, None, "identity", "gzip", "deflate", "snappy", "gzip,gzip", ""])
        if encoding is not None:
            self.fields.append(("grpc-encoding", encoding))
        if not random.randrange(8):
            timeout = random.choice(["1n", "1S", "99999999H", "999999999S", "-1S", "1", "S", "1 S", "\u0661S", ""])
            self.fields.append(("grpc-timeout", timeout))
        self.body = _body(random, pb.AdmitRequest(user_id=user_id).SerializeToString())
        cuts = [random.randrange(len(self.body) + 1) for _ in range(random.choice([0, 0, 1, 5]))]
        cuts = sorted({0, *cuts, *range(0, len(self.body), 16_000), len(self.body)})
        # No part is empty: two empty frames in a row end the connection.
        self.parts = [self.body[a:b] for a, b in pairwise(cuts)]
        self.padding = random.choice([None, None, 0, 200])
        self.trailers = not random.randrange(10)

    def __repr__(self) -> str:
        return f"{self.fields[3]} {self.fields[6:]} {self.body[:200]!r} in {len(self.parts)} parts"

    def frames(self, stream: int) -> bytes:
        head = b"".join(
            b"\0" + b"".join(_length(part) + part for part in (n.encode(), v.encode())) for n, v in self.fields
        )
        sent = http2.frame(http2.HEADERS, http2.END_HEADERS, stream, head)
        for part in self.parts:
            if self.padding is None:
                sent += http2.data(stream, part)
            else:
                sent += http2.frame(http2.DATA, 8, stream, bytes([self.padding]) + part + b"\0" * self.padding)
        if self.trailers:
            return sent + http2.headers(stream, [("x-trailer", "1"), ("grpc-status", "0")], end=True)
        return sent + http2.data(stream, b"", end=True)


def _length(text: bytes) -> bytes:
    """The length of a header's name or value; those over 126 bytes take a second one."""
    return bytes([len(text)]) if len(text) < 127 else bytes([127, len(text) - 127])


def _body(random: Random, message: bytes) -> bytes:
    """Messages in gRPC's framing, most of them wrongly."""
    compressed = random.choice([gzip.compress(message, mtime=0), zlib.compress(message), _BOMB, message])
    if not random.randrange(4):
        compressed = compressed[: random.randrange(len(compressed) + 1)]
    size = len(message)
    return random.choice(
        [
            struct.pack(">BI", 0, size) + message,
            struct.pack(">BI", 1, len(compressed)) + compressed,
            struct.pack(">BI", 1, len(compressed)) + compressed + random.randbytes(3),
            struct.pack(">BI", random.randrange(2, 256), size) + message,
            struct.pack(">BI", 0, size + random.choice([-1, 1, 5, 70_000, 2**31, 2**32 - 1 - size])) + message,
            struct.pack(">BI", 0, 0) + message,
            struct.pack(">BI", 0, size)[: random.randrange(5)],
            b"",
            (struct.pack(">BI", 0, size) + message) * random.choice([2, 3, 50]),
            struct.pack(">BI", 0, 0) * random.choice([1, 2, 1000]),
            struct.pack(">BI", 0, size) + message + random.randbytes(4),
            random.randbytes(random.randrange(40)),
            struct.pack(">BI", 0, 50_000) + b"\0" * 50_000 if not random.randrange(5) else b"\0\0\0\0\2\x08",
        ]
    )
