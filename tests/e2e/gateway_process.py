"""A real Envoy with the gateway's configuration, and a caller that sends what it is told, byte by byte."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.cli.gateway import CONFIG, GatewaySettings, Lane, command, files, lane_environment
from tests.harness import ROOT

DEADLINE_S = 30.0
T = TypeVar("T")
# All that a REST caller may see of an answer's headers.
RESPONSE_HEADERS = {"connection", "content-length", "content-type", "date", "retry-after", "x-request-id"}
INSIDE = ("envoy", "upstream", "september.", "google", "grpc", "type_", "proto", "class")


@dataclass(frozen=True)
class Answer:
    """A REST answer as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        """The body of an answer that shows nothing of the inside."""
        assert {name for name, _ in self.headers} <= RESPONSE_HEADERS
        assert self.header("content-type") == "application/json"
        return json.loads(self.body)

    def error(self) -> tuple[int, str, str]:
        """Status, code and message of an error."""
        envelope = self.json()
        assert list(envelope) == ["error"]
        assert list(envelope["error"]) == ["code", "message"]
        return self.status, envelope["error"]["code"], envelope["error"]["message"]

    def own_error(self) -> tuple[int, str, str]:
        """Status, code and message of an error of which the gateway wrote the message."""
        error = self.error()
        assert not [word for word in INSIDE if word in error[2].lower()], error
        return error


@dataclass(frozen=True)
class Lines:
    """An answer of many lines, while it comes.

    Args:
        local_port: port of the caller's end of the connection.
    """

    status: int
    headers: list[tuple[str, str]]
    local_port: int
    _reader: asyncio.StreamReader

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Every line's object, as soon as it is there.

        Raises:
            IncompleteReadError: the answer was broken off.
            TimeoutError: nothing comes.
        """
        line = b""
        while True:
            async with asyncio.timeout(DEADLINE_S):
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                line += (await self._reader.readexactly(size + 2))[:size]
            if not size:
                assert not line
                return
            *complete, line = line.split(b"\n")
            for one in complete:
                yield json.loads(one)


@dataclass(frozen=True)
class Endpoint:
    """A gateway, as its callers know it.

    Args:
        address: for products.
        operators: for operators.
    """

    address: str
    operators: str

    async def rest(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Iterable[tuple[str, str]] = (),
        *,
        listener: str | None = None,
    ) -> Answer:
        """Calls where the call belongs, unless told where."""
        headers = list(headers)
        if listener is None:
            shown = {name.lower() for name, _ in headers}
            is_operators = path.startswith("/products") or ("x-admin-key" in shown and "x-platform-key" not in shown)
            listener = self.operators if is_operators else self.address
        lines = [f"{method} {path} HTTP/1.1", "host: gateway", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        return await _exchange(listener, "\r\n".join([*lines, "", ""]).encode() + (body or b""))

    @asynccontextmanager
    async def lines(self, path: str, headers: Iterable[tuple[str, str]] = ()) -> AsyncIterator[Lines]:
        """Asks for an answer of many lines; the caller leaves at the block's end."""
        host, port = self.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            lines = [f"GET {path} HTTP/1.1", "host: gateway", *(f"{name}: {value}" for name, value in headers), "", ""]
            writer.write("\r\n".join(lines).encode())
            async with asyncio.timeout(DEADLINE_S):
                status, got = await _head(reader)
            yield Lines(status, got, writer.get_extra_info("sockname")[1], reader)
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def raw(self, request: bytes) -> Answer:
        """Sends these bytes and reads one answer."""
        return await _exchange(self.address, request)


@dataclass(frozen=True)
class Gateway(Endpoint):
    """A gateway of the test's own."""

    admin: str
    output: Path
    log: Path
    process: asyncio.subprocess.Process

    async def admin_page(self, path: str) -> bytes:
        return (await _get(self.admin, path)).body

    def calls(self) -> list[dict[str, Any]]:
        """The access log so far."""
        # What stands after the last newline is being written.
        return [json.loads(line) for line in self.output.read_text().split("\n")[:-1]]


@dataclass(frozen=True)
class Inside:
    """Admission inside of the gateway.

    Args:
        app: `module:attribute` of what runs there.
        environment: its own variables.
    """

    app: str
    environment: Mapping[str, str]


def placed(lane: Lane, admission: str, **environment: str) -> str | Inside:
    """Admission in this lane: what listens at the address, or inside of the gateway what passes calls on to it."""
    if lane is Lane.GRPC:
        return admission
    return Inside("tests.e2e.lane_app:app", {"ADMISSION": admission, **environment})


@asynccontextmanager
async def running_gateway(
    directory: Path,
    admission: str | Inside,
    provisioner: str,
    edit: Callable[[str], str] = lambda config: config,
    **more: Any,
) -> AsyncIterator[Gateway]:
    """Runs a gateway on free ports.

    Args:
        directory: for configuration and logs.
        admission: `host:port` of Admission, or what is inside.
        provisioner: `host:port` of the Provisioner.
        edit: changes the configuration: shorter timeouts, smaller limits.
        more: of its settings.
    """
    config, admin_file = directory / CONFIG, directory / "admin"
    environment: Mapping[str, str] = os.environ
    if isinstance(admission, Inside):
        settings = GatewaySettings(
            "127.0.0.1:0", None, provisioner, lane_app=admission.app, directory=directory, **more
        )
        environment = {**os.environ, **(lane_environment() or {}), **admission.environment}
    else:
        settings = GatewaySettings("127.0.0.1:0", admission, provisioner, directory=directory, **more)
    for name, text in files(settings).items():
        (directory / name).write_text(edit(text))
    started = started_gateway([*command(config), "--admin-address-path", str(admin_file)], environment, admin_file)
    async with started as gateway:
        yield gateway


@asynccontextmanager
async def started_gateway(
    command: Sequence[str], environment: Mapping[str, str], admin_file: Path
) -> AsyncIterator[Gateway]:
    """Runs a command that becomes a gateway.

    Args:
        admin_file: to which it writes the address of its admin interface; logs go beside it.
    """
    output, log = admin_file.with_name("stdout"), admin_file.with_name("stderr")
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr
        )

    def written() -> str:
        return admin_file.read_text() if admin_file.exists() else ""

    async def ready() -> str | None:
        assert process.returncode is None, log.read_text()
        admin = written()
        return admin if admin and (await _get(admin, "/ready")).status == 200 else None

    try:
        admin = await eventually(ready)
        listeners = await _get(admin, "/listeners?format=json")
        sockets = {
            status["name"]: status["local_address"]["socket_address"]
            for status in json.loads(listeners.body)["listener_statuses"]
        }
        addresses = {name: f"{socket['address']}:{socket['port_value']}" for name, socket in sockets.items()}
        yield Gateway(addresses["gateway"], addresses["operators"], admin, output, log, process)
        # After a script's error Envoy goes on as if there were no script.
        assert "script log" not in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def eventually(condition: Callable[[], Awaitable[T | None]]) -> T:
    """The condition's first true value."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if value := await condition():
                return value
            await asyncio.sleep(0.01)


async def _get(address: str, path: str) -> Answer:
    return await _exchange(address, f"GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n".encode())


async def _exchange(address: str, request: bytes) -> Answer:
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            status, headers = await _head(reader)
            length = dict(headers).get("content-length")
            if request.startswith(b"HEAD "):
                body = b""
            else:
                body = await reader.readexactly(int(length)) if length else _joined(await reader.read())
        finally:
            # The gateway may have closed first, without reading all of a request that it refused.
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()
    return Answer(status, headers, body)


async def _head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[str, str]]]:
    """An answer's status and headers."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return int(status.split()[1]), [(name.lower(), value) for name, value in pairs]


def _joined(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        body, chunks = body + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    return body
