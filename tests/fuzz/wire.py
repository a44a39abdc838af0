"""HTTP/1.1 byte by byte: paths, headers, bodies and framings that no client would send."""

import asyncio
from collections.abc import Iterator
from random import Random

from tests.fuzz.corpus import BODIES, CALLS, CHUNKED, FRAMINGS, NAMES, QUERIES, SEGMENTS, SMUGGLED, VALUES, VERBS
from tests.fuzz.targets import DEADLINE_S, Tally, Targets, Verdict, rest_verdict

_CONNECTIONS = 16
# What no gateway takes for a request.
_INSIDE = f"GET {SMUGGLED} HTTP/1.1\r\nhost: a\r\nx: ".encode()


def feed(runner: asyncio.Runner, targets: Targets, tally: Tally, number: int, seed: int) -> None:
    """Sends about so many requests, as many to each listener: most whole, on connections that stay, the rest not."""
    random = Random(seed)
    each = number // len(targets.listeners)
    whole = [_request(random, targets) for _ in range(each * 9 // 10)]
    broken = [_broken(random, targets) for _ in range(each - len(whole))]

    async def send() -> None:
        async with asyncio.TaskGroup() as group:
            for address in targets.listeners:
                for requests, use in ((iter(whole), _one_after_the_other), (iter(broken), _each_for_itself)):
                    for _ in range(_CONNECTIONS):
                        group.create_task(use(address, requests, tally))

    runner.run(send())


def _some(random: Random, values: list[str]) -> bytes:
    return random.choice(values).encode("utf-8", "surrogateescape")


def _head(random: Random, targets: Targets) -> bytes:
    verb, path = random.choice(CALLS)
    if not random.randrange(12):
        verb = random.choice([*VERBS, "HEAD"])
    path = path.replace("{}", "\0")
    while "\0" in path:
        known = random.choice([targets.user_id, targets.changed_id, "Admit", "a"])
        path = path.replace("\0", random.choice([random.choice(SEGMENTS), known, known]), 1)
    query = random.choice(QUERIES) if not random.randrange(3) else ""
    version = (
        "HTTP/1.1" if random.randrange(40) else random.choice(["HTTP/1.0", "HTTP/2.0", "HTTP/1.1 ", "http/1.1", ""])
    )
    lines = [f"{verb} {path}{query} {version}".encode()]
    names = [("host", "a"), *targets.headers] if random.randrange(8) else [("host", "a")]
    lines += [f"{name}: {value}".encode() for name, value in names]
    for _ in range(random.choice([0, 0, 1, 2, 3, 70])):
        lines.append(_some(random, NAMES) + b": " + _some(random, VALUES))
    return b"\r\n".join(lines)


def _request(random: Random, targets: Targets) -> bytes:
    """A request that ends where it says that it does."""
    body = random.choice(BODIES) if random.randrange(3) else b""
    if body and not random.randrange(4):
        at = random.randrange(len(body))
        body = body[:at] + random.randbytes(1) + body[at + 1 :]
    return _head(random, targets) + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def _broken(random: Random, targets: Targets) -> bytes:
    """A request of which nobody knows where it ends, or that does not end."""
    kind = random.randrange(10)
    if kind == 0:
        return random.randbytes(random.randrange(1, 200))
    if kind == 1:
        request = _request(random, targets)
        return request[: random.randrange(1, len(request))]
    framing = random.choice(FRAMINGS)
    chunked = random.choice(CHUNKED) if random.randrange(2) else b"0\r\n\r\n"
    body = chunked + _INSIDE if b"{n}" in framing else chunked
    head = b"POST /engines/a/admit HTTP/1.1\r\nhost: a" if random.randrange(2) else _head(random, targets)
    return head + b"\r\n" + framing.replace(b"{n}", b"%d" % len(body)) + b"\r\n\r\n" + body


async def _one_after_the_other(address: str, requests: Iterator[bytes], tally: Tally) -> None:
    connection = _Connection(address)
    for request in requests:
        tally.count(await connection.verdict(request), request)
    connection.close()


async def _each_for_itself(address: str, requests: Iterator[bytes], tally: Tally) -> None:
    for request in requests:
        connection = _Connection(address)
        tally.count(await connection.verdict(request), request)
        connection.close()


class _Connection:
    """A connection that is opened anew when the gateway has closed it."""

    def __init__(self, address: str) -> None:
        self._host, port = address.split(":")
        self._port = int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def verdict(self, request: bytes) -> Verdict:
        """Sends a request, and judges its answer."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(self._host, self._port)
                reader, writer = self._streams
                writer.write(request)
                status, headers = await _head_of_answer(reader)
                body = b"" if request.startswith(b"HEAD ") else await _body(reader, headers)
        except TimeoutError:
            self.close()
            return Verdict(f"no answer within {DEADLINE_S} s", False)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.close()
            return Verdict(f"no answer: {error!r}", False)
        if headers.get("connection") == "close":
            self.close()
        if request.startswith(b"HEAD ") and status < 500:
            return Verdict(None, status != 200)
        return rest_verdict(status, body)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


async def _head_of_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        status = int(first.split()[1])
        if status != 100:
            return status, dict(line.lower().split(": ", 1) for line in lines if ": " in line)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:size]
    # Trailers, if any, and the empty line.
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return body
