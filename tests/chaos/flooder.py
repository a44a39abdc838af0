"""A process that calls with wrong keys, so many times a second, whether it is answered or not, until its input ends.

Its arguments are HOST:PORT, how many calls a second, and the address that they come from. It prints, as JSON, for how
many seconds it did so, how many calls it sent in them, and how many of those were answered with which code.
"""

import asyncio
import json
import re
import secrets
import struct
import sys
from collections import Counter

from tests.e2e import http2

# Of which each may have 1,000 calls open.
_CONNECTIONS = 20
_TICK_S = 0.001
# What the gateway does not take stays in the kernel, and no more of it here: it is not sent.
_MOST_UNSENT = 65536
_FIELDS = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/engines/ada/admit")]
_HEAD = slice(0, 5)
_REST = slice(9, None)
_CODE = re.compile(rb'"code":"([A-Z_]+)"')


def _requests(count: int) -> list[tuple[bytes, bytes]]:
    """Calls, each with a key of its own, as what stands before and after the number of the stream."""
    keys = (f"pk-sept-{secrets.token_urlsafe(32)}" for _ in range(count))
    calls = (http2.headers(0, [*_FIELDS, ("x-platform-key", key)], end=True) for key in keys)
    return [(call[_HEAD], call[_REST]) for call in calls]


class _Connection(asyncio.Protocol):
    """Sends calls, and looks for nothing in what comes back but the codes."""

    def __init__(self, answers: Counter[str]) -> None:
        self._answers = answers
        self._stream = -1
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # Windows for all answers that will ever come.
        settings = http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1))
        window = http2.frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 65536))
        transport.write(http2.PREFACE + settings + window)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        end = 0
        for found in _CODE.finditer(data):
            self._answers[found[1].decode()] += 1
            end = found.end()
        self._rest = data[end:][-64:]

    def send(self, requests: list[tuple[bytes, bytes]]) -> int:
        """Returns how many were sent."""
        if self._transport.get_write_buffer_size() > _MOST_UNSENT:
            return 0
        frames: list[bytes] = []
        for head, rest in requests:
            self._stream += 2
            frames += (head, struct.pack(">I", self._stream), rest)
        self._transport.write(b"".join(frames))
        return len(requests)


async def _flood(address: str, calls_per_s: float, of: str) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    host, port = address.split(":")
    answers: Counter[str] = Counter()
    connections = [
        (await loop.create_connection(lambda: _Connection(answers), host, int(port), local_addr=(of, 0)))[1]
        for _ in range(_CONNECTIONS)
    ]
    requests = _requests(10_000)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    began = loop.time()
    due = sent = turn = 0
    while not ended.done():
        await asyncio.sleep(_TICK_S)
        due, before = int((loop.time() - began) * calls_per_s), due
        some = requests[: due - before]
        turn += 1
        sent += connections[turn % _CONNECTIONS].send(some)
        requests = requests[len(some) :] + some
    return {"seconds": loop.time() - began, "sent": sent, "answers": answers}


if __name__ == "__main__":
    address, calls_per_s, of = sys.argv[1:]
    print(json.dumps(asyncio.run(_flood(address, float(calls_per_s), of))))
