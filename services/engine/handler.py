"""HTTP/1.1: the engine's routes, one `Handler` per connection."""

import json
import re
import select
import socket
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

from services.engine.conversation import Conversations, DatabaseUnavailable, Turn
from services.engine.errors import (
    EngineError,
    Internal,
    InvalidEngineKey,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    Unavailable,
)
from services.engine.keys import KeyRing
from services.engine.log import log
from services.engine.server import Server
from services.engine.turns import Turns
from services.engine.validation import parse_execute, parse_rotate_key

MAX_BODY_BYTES = 64 * 1024
# Read and thrown away, so that a client in the middle of sending meets the answer, not a reset.
MAX_DISCARDED_BYTES = 1024 * 1024
# Seconds for one read or write, and for the next request on an open connection: longer than
# the pause between health probes, which reuse theirs.
SOCKET_TIMEOUT_S = 120


class Engine(NamedTuple):
    """What all connections share. Args: started: by the monotonic clock, in seconds."""

    keys: KeyRing
    conversations: Conversations
    turns: Turns
    catalog: Path
    started: float


class Handler(BaseHTTPRequestHandler):
    """Serves one connection; the constructor returns when it has ended."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # the answer to a line that is no HTTP at all has a status line, too
    timeout = SOCKET_TIMEOUT_S
    disable_nagle_algorithm = True

    def __init__(self, connection: socket.socket, server: Server, engine: Engine) -> None:
        self._server = server
        self._engine = engine
        super().__init__(connection, connection.getpeername(), server)  # type: ignore[arg-type] # kept, never used

    def do_GET(self) -> None:
        """Answers one request, whatever its method."""
        try:
            body = self._read_body()
            self._server.begin_request(self.connection)
            self._dispatch(body)
        except EngineError as error:
            self._respond_error(error)
        except OSError:
            raise  # the client has gone, there is nobody to answer
        except Exception:
            self._respond_error(Internal())
            raise
        if not self._server.end_request(self.connection):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815 - looked up by method

    def _dispatch(self, body: bytes) -> None:
        routes = {
            "/health": ("GET", self._health),
            "/execute": ("POST", self._execute),
            "/internal/rotate-key": ("POST", self._rotate_key),
        }
        method, answer = routes.get(self.path.partition("?")[0], (None, None))
        if answer is None or method is None:
            raise RouteNotFound
        if method != self.command:
            raise MethodNotAllowed(method)
        answer(body)

    def _health(self, _body: bytes) -> None:
        try:
            self._engine.conversations.check()
            database = "ok"
        except DatabaseUnavailable as error:
            log("database_unavailable", reason=str(error))
            database = "unavailable"
        healthy = database == "ok"
        self._respond(
            HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE,
            {
                "status": "ok" if healthy else "degraded",
                "uptime_seconds": round(time.monotonic() - self._engine.started, 3),
                "active": self._engine.turns.active,
                "subsystems": {
                    "database": database,
                    "catalog": "ok" if self._engine.catalog.is_dir() else "missing",
                },
            },
        )

    def _execute(self, body: bytes) -> None:
        self._authenticate()
        request = parse_execute(body)
        with self._engine.turns.running():
            try:
                turn = self._engine.conversations.take_turn(request.conversation_id, request.message)
            except DatabaseUnavailable as error:
                log("database_unavailable", reason=str(error))
                raise Unavailable("the engine's memory is not available") from error
            self._stream(turn, request.conversation_id, request.delay_s)
        # Only now the end of the body: a client that has read it finds the engine no longer active.
        self._send_chunk(b"")

    def _rotate_key(self, body: bytes) -> None:
        key = self._authenticate()
        request = parse_rotate_key(body)
        if not self._engine.keys.rotate(key, request.key_hash, request.overlap_s):
            raise InvalidEngineKey
        self._respond(HTTPStatus.OK, {"status": "rotated"})

    def _authenticate(self) -> str:
        keys = self.headers.get_all("X-Engine-Key", [])
        if len(keys) != 1 or not self._engine.keys.accepts(keys[0]):
            raise InvalidEngineKey
        return str(keys[0])

    def _read_body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", ["0"])
        length = lengths[0]
        # Whoever sends a body of unclear length gets no second request on this connection.
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise InvalidRequest("Transfer-Encoding is not supported, send Content-Length")
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", length):
            self.close_connection = True
            raise InvalidRequest("Content-Length must be one number")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self.rfile.read(min(int(length), MAX_DISCARDED_BYTES))
            raise InvalidRequest(f"body must be at most {MAX_BODY_BYTES} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError
        return body

    def _stream(self, turn: Turn, conversation_id: str, delay_s: float) -> None:
        if self._old_protocol:
            self.close_connection = True
        self._send_head(
            HTTPStatus.OK,
            {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
            | ({} if self._old_protocol else {"Transfer-Encoding": "chunked"}),
        )
        pieces = re.findall(r"\S+\s*", turn.reply)
        for piece in pieces:
            self._pause(delay_s / len(pieces))
            self._send_event("delta", {"text": piece})
        done = {"conversation_id": conversation_id, "turn": turn.number, "messages": turn.messages}
        self._send_event("done", done)

    def _pause(self, seconds: float) -> None:
        """Waits, unless the client goes away: nobody would see it in time from writes alone."""
        departure = select.poll()
        departure.register(self.connection, select.POLLRDHUP)
        if departure.poll(seconds * 1000):
            raise ConnectionAbortedError

    def _send_event(self, event: str, data: dict[str, object]) -> None:
        self._send_chunk(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())

    def _send_chunk(self, chunk: bytes) -> None:
        """An empty chunk ends the body; for HTTP/1.0, without chunks, the connection's end does."""
        self.wfile.write(chunk if self._old_protocol else b"%x\r\n%b\r\n" % (len(chunk), chunk))

    @property
    def _old_protocol(self) -> bool:
        return self.request_version == "HTTP/1.0"

    def _respond(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._send_head(
            status, {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def _respond_error(self, error: EngineError) -> None:
        self._respond(error.status, {"error": {"code": error.code, "message": error.message}}, error.headers)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        if self._server.stopping:
            self.close_connection = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class calls for requests that it can't read: our JSON in place of its HTML."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._respond_error(MethodNotAllowed("GET, POST"))
        else:
            self._respond_error(InvalidRequest("not a valid HTTP request"))

    def version_string(self) -> str:
        return "september-engine"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """No access log: probes would fill it."""
