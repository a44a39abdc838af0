"""The reference engine as a real process, spoken to over real sockets."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-sept-test-key"
DEADLINE_S = 10
MAX_CONNECTIONS = 64
MAX_TURNS = 32


def hash_of(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.005)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        assert self.json.keys() == {"error"}
        assert self.json["error"].keys() == {"code", "message"}
        return self.status, self.json["error"]["code"]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The stream as (event, data), in order."""
        assert self.status == 200
        assert self.body.endswith("\n\n")
        events = []
        for block in self.body.removesuffix("\n\n").split("\n\n"):
            event, data = block.split("\n")
            events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return events

    @property
    def reply(self) -> str:
        return "".join(data["text"] for event, data in self.events if event == "delta")

    @property
    def done(self) -> Any:
        event, data = self.events[-1]
        assert event == "done"
        return data


def answer_of(response: HTTPResponse) -> Answer:
    return Answer(response.status, dict(response.headers), response.read().decode())


class EngineProcess:
    """One engine: its data directory stays the same from start to start."""

    def __init__(self, directory: Path) -> None:
        self.database = directory / "brain.sqlite"
        self.environment = {
            "ENGINE_KEY_HASH": hash_of(KEY),
            "SQLITE_DB_PATH": str(self.database),
            "CATALOG_DIR": str(directory),
            "HOST": "127.0.0.1",
            "PORT": "0",
        }

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.engine"],
            cwd=ROOT,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.log = self.process.stderr.readline()
        self.port = json.loads(self.log)["port"]

    def end(self, number: signal.Signals) -> int:
        """Sends the signal; returns the exit code. The log is complete then."""
        self.process.send_signal(number)
        self.log += self.process.communicate(timeout=DEADLINE_S)[1]
        return self.process.returncode

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def request(
        self, method: str, path: str, body: object = None, *, headers: list[tuple[str, str]] | None = None
    ) -> Answer:
        """Args: body: bytes as they are, anything else as JSON. headers: the right key if None."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        with closing(self.connect()) as connection:
            connection.putrequest(method, path)
            for name, value in [("X-Engine-Key", KEY)] if headers is None else headers:
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            return answer_of(connection.getresponse())

    def execute(self, message: str, *, key: str = KEY, **fields: object) -> Answer:
        return self.request("POST", "/execute", {"message": message} | fields, headers=[("X-Engine-Key", key)])

    def rotate(self, key: str, to: str, overlap_s: float) -> Answer:
        body = {"key_hash": hash_of(to), "overlap_s": overlap_s}
        return self.request("POST", "/internal/rotate-key", body, headers=[("X-Engine-Key", key)])

    def health(self) -> Answer:
        return self.request("GET", "/health", headers=[])

    def begin_turn(self, *, delay_s: float) -> tuple[HTTPConnection, HTTPResponse]:
        """Returns when the turn is running: the head of its answer is here."""
        connection = self.connect()
        connection.request("POST", "/execute", json.dumps({"message": "m", "delay_s": delay_s}), {"X-Engine-Key": KEY})
        return connection, connection.getresponse()

    @property
    def active(self) -> bool:
        active: bool = self.health().json["active"]
        return active


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(tmp_path)
    yield engine
    if hasattr(engine, "process") and engine.process.poll() is None:
        engine.end(signal.SIGKILL)


@pytest.fixture
def engine(stopped: EngineProcess) -> EngineProcess:
    stopped.start()
    return stopped


def test_health_needs_no_key(engine: EngineProcess) -> None:
    answer = engine.health()
    assert answer.status == 200
    assert answer.json.pop("uptime_seconds") >= 0
    assert answer.json | {"uptime_seconds": 0} == {
        "status": "ok",
        "uptime_seconds": 0,
        "active": False,
        "subsystems": {"database": "ok", "catalog": "ok"},
    }


def test_a_missing_catalog_is_told_and_does_no_harm(stopped: EngineProcess) -> None:
    stopped.environment["CATALOG_DIR"] = "/nowhere"
    stopped.start()
    assert stopped.health().json["subsystems"] == {"database": "ok", "catalog": "missing"}


def test_a_lost_database_makes_the_engine_degraded_and_turns_unavailable(engine: EngineProcess) -> None:
    engine.database.unlink()
    answer = engine.health()
    assert (answer.status, answer.json["status"]) == (503, "degraded")
    assert answer.json["subsystems"]["database"] == "unavailable"
    assert engine.execute("hello").error == (503, "UNAVAILABLE")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ENGINE_KEY_HASH", None), ("ENGINE_KEY_HASH", "a1b2"), ("ENGINE_KEY_HASH", "canary" * 11), ("PORT", "canary")],
)
def test_a_wrong_setting_is_refused_by_name_on_one_line(
    stopped: EngineProcess, variable: str, value: str | None
) -> None:
    environment = {name: text for name, text in stopped.environment.items() if name != variable}
    if value is not None:
        environment[variable] = value
    ended = subprocess.run(
        [sys.executable, "-m", "services.engine"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert variable in ended.stderr
    assert "canary" not in ended.stderr


def test_a_database_that_cannot_be_opened_ends_the_start(stopped: EngineProcess) -> None:
    stopped.database.mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "services.engine"],
        cwd=ROOT, env=stopped.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert json.loads(ended.stderr)["reason"].startswith("SQLITE_DB_PATH")


@pytest.mark.parametrize("path", ["/execute", "/internal/rotate-key"])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("X-Engine-Key", "")],
        [("X-Engine-Key", "sk-sept-other")],
        [("X-Engine-Key", hash_of(KEY))],
        [("X-Engine-Key", "\xff")],
        [("X-Engine-Key", KEY), ("X-Engine-Key", KEY)],
        [("X-Engine-Key", KEY), ("X-Engine-Key", "sk-sept-other")],
        [("X_Engine_Key", KEY)],
    ],
)
def test_without_the_one_right_key_nothing_is_done(
    engine: EngineProcess, path: str, headers: list[tuple[str, str]]
) -> None:
    body = {"message": "m"} if path == "/execute" else {"key_hash": hash_of("x"), "overlap_s": 0}
    assert engine.request("POST", path, body, headers=headers).error == (401, "INVALID_ENGINE_KEY")
    assert engine.execute("hello").done["turn"] == 1


def test_a_turn_is_streamed_as_deltas_and_done(engine: EngineProcess) -> None:
    answer = engine.execute("hello")
    assert answer.headers["Content-Type"] == "text/event-stream"
    *deltas, done = answer.events
    assert len(deltas) > 1
    assert {event for event, _ in deltas} == {"delta"}
    assert done == ("done", {"conversation_id": "default", "turn": 1, "messages": 2})
    second = engine.execute("again", conversation_id="default")
    assert "turn 2" in second.reply
    assert "hello" in second.reply
    assert second.done["messages"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_finished_turns_are_remembered_after(engine: EngineProcess, number: signal.Signals) -> None:
    engine.execute("my cat is called Miso", conversation_id="cats")
    engine.end(number)
    engine.start()
    answer = engine.execute("what is it called?", conversation_id="cats")
    assert "my cat is called Miso" in answer.reply
    assert answer.done == {"conversation_id": "cats", "turn": 2, "messages": 4}


def test_every_word_that_was_read_is_remembered_after_sigkill(engine: EngineProcess) -> None:
    connection, response = engine.begin_turn(delay_s=6)
    with closing(connection), closing(response):
        assert response.readline() == b"event: delta\n"
        engine.end(signal.SIGKILL)
    engine.start()
    assert engine.execute("next").done["turn"] == 2


def test_it_is_active_while_a_turn_runs_and_not_after(engine: EngineProcess) -> None:
    assert not engine.active
    connection, response = engine.begin_turn(delay_s=0.5)
    with closing(connection):
        assert engine.active
        assert answer_of(response).done["turn"] == 1
        assert not engine.active


def test_a_client_that_leaves_ends_its_turn_and_nothing_else(engine: EngineProcess) -> None:
    connection, response = engine.begin_turn(delay_s=600)
    assert engine.active
    response.close()
    connection.close()
    until(lambda: not engine.active)
    assert engine.execute("still there?").done["turn"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_turn_finish_and_takes_no_new_one(
    engine: EngineProcess, number: signal.Signals
) -> None:
    connection, response = engine.begin_turn(delay_s=1)
    with closing(connection), socket.create_connection(("127.0.0.1", engine.port)), ThreadPoolExecutor(1) as pool:
        ending = pool.submit(engine.end, number)
        until(lambda: not accepts_connections(engine.port))
        assert not ending.done()
        assert answer_of(response).done["turn"] == 1
        assert ending.result() == 0
    assert json.loads(engine.log.splitlines()[-1])["requests_cut"] == 0
    assert not engine.database.with_name("brain.sqlite-wal").exists()


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_log_has_a_start_and_a_stop_and_no_key(engine: EngineProcess) -> None:
    for _ in range(3):
        engine.health()
    engine.execute("hello")
    engine.execute("hello", key="sk-sept-other")
    assert engine.rotate(KEY, "sk-sept-new", 60).status == 200
    assert engine.end(signal.SIGTERM) == 0
    assert [json.loads(line)["event"] for line in engine.log.splitlines()] == ["started", "stopped"]
    for secret in ("sk-sept", hash_of(KEY), hash_of("sk-sept-new")):
        assert secret not in engine.log


def test_a_rotated_key_is_good_at_once_and_the_old_one_for_the_overlap(engine: EngineProcess) -> None:
    assert engine.rotate(KEY, "second", 3600).status == 200
    assert engine.execute("m", key="second").status == 200
    assert engine.execute("m", key=KEY).status == 200
    assert engine.rotate(KEY, "taken over", 3600).error == (401, "INVALID_ENGINE_KEY")
    assert engine.rotate("second", "third", 0).status == 200
    assert engine.execute("m", key="second").error == (401, "INVALID_ENGINE_KEY")
    assert engine.execute("m", key="third").status == 200


def test_the_old_key_ends_with_the_overlap(engine: EngineProcess) -> None:
    assert engine.rotate(KEY, "second", 0.2).status == 200
    until(lambda: engine.execute("m", key=KEY).status == 401)
    assert engine.execute("m", key="second").status == 200


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/execute", b"", "JSON"),
        ("/execute", b'{"message": "\xff"}', "JSON"),
        ("/execute", b"[" * 60_000, "JSON"),
        ("/execute", [], "object"),
        ("/execute", {}, "message"),
        ("/execute", {"message": ""}, "message"),
        ("/execute", {"message": "\ud800"}, "message"),
        ("/execute", {"message": "m", "conversation_id": 1}, "conversation_id"),
        ("/execute", {"message": "m", "delay_s": 601}, "delay_s"),
        ("/execute", {"message": "m", "mesage": "m"}, "mesage"),
        ("/execute", {"message": "m" * 65_536}, "65536 bytes"),
        ("/execute", b"x" * 2_000_000, "65536 bytes"),
        ("/internal/rotate-key", {"overlap_s": 0}, "key_hash"),
        ("/internal/rotate-key", {"key_hash": "0" * 64, "overlap_s": -1}, "overlap_s"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_body_is_refused_by_the_name_of_what_is_wrong(
    engine: EngineProcess, path: str, body: object, names: str
) -> None:
    answer = engine.request("POST", path, body)
    assert answer.error == (400, "INVALID_REQUEST")
    assert names in answer.json["error"]["message"]
    assert engine.execute("hello").done["turn"] == 1


@pytest.mark.parametrize(
    ("method", "path", "error"),
    [
        ("GET", "/", (404, "ROUTE_NOT_FOUND")),
        ("POST", "/execute/", (404, "ROUTE_NOT_FOUND")),
        ("DELETE", "/nowhere", (404, "ROUTE_NOT_FOUND")),
        ("GET", "/execute", (405, "METHOD_NOT_ALLOWED")),
        ("POST", "/health", (405, "METHOD_NOT_ALLOWED")),
        ("PUT", "/internal/rotate-key", (405, "METHOD_NOT_ALLOWED")),
        ("BREW", "/health", (405, "METHOD_NOT_ALLOWED")),
    ],
)
def test_unknown_paths_and_methods(engine: EngineProcess, method: str, path: str, error: tuple[int, str]) -> None:
    answer = engine.request(method, path)
    assert answer.error == error
    assert ("Allow" in answer.headers) == (error[0] == 405)


@pytest.mark.parametrize(
    "head",
    [
        b"garbage\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nContent-Length: +1\r\n\r\nx",
        b"POST /execute HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /execute HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n",
    ],
    ids=lambda head: repr(head[:60]),
)
def test_what_is_not_proper_http_gets_a_json_error_and_no_second_request(engine: EngineProcess, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", engine.port), timeout=DEADLINE_S) as connection:
        connection.sendall(head)
        response = HTTPResponse(connection)
        response.begin()
        assert answer_of(response).error == (400, "INVALID_REQUEST")
        assert response.will_close
    assert engine.health().status == 200


def test_an_old_client_reads_the_stream_until_the_connection_ends(engine: EngineProcess) -> None:
    body = b'{"message": "hello"}'
    with socket.create_connection(("127.0.0.1", engine.port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b"POST /execute HTTP/1.0\r\nX-Engine-Key: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (KEY.encode(), len(body), body)
        )
        with closing(HTTPResponse(connection)) as response:
            response.begin()
            assert answer_of(response).done["turn"] == 1


def test_one_connection_serves_many_requests(engine: EngineProcess) -> None:
    with closing(engine.connect()) as connection:
        connection.connect()
        used = connection.sock
        for _ in range(3):
            connection.request("GET", "/health")
            assert answer_of(connection.getresponse()).status == 200
            connection.request("POST", "/execute", b"{", {"X-Engine-Key": "wrong"})
            assert answer_of(connection.getresponse()).status == 401
            connection.request("POST", "/execute", b'{"message": "m"}', {"X-Engine-Key": KEY})
            assert answer_of(connection.getresponse()).status == 200
            assert connection.sock is used


def test_concurrent_turns_of_one_conversation_each_get_their_own_number(engine: EngineProcess) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: engine.execute(f"message {n}"), range(48)))
    assert sorted(answer.done["turn"] for answer in answers) == list(range(1, 49))


def test_idle_and_slow_clients_give_way_and_running_turns_do_not(engine: EngineProcess) -> None:
    connection, response = engine.begin_turn(delay_s=2)
    with closing(connection), ExitStack() as clients:
        for n in range(2 * MAX_CONNECTIONS):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", engine.port), timeout=DEADLINE_S))
            client.sendall(b"" if n % 2 else b"POST /execute HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        assert engine.health().status == 200
        threads = len(list(Path(f"/proc/{engine.process.pid}/task").iterdir()))
        assert threads <= MAX_CONNECTIONS + 8  # those that gave way just now may still be ending
        assert answer_of(response).done["turn"] == 1


def test_too_many_turns_are_refused_while_health_still_answers(engine: EngineProcess) -> None:
    with ExitStack() as turns:
        for _ in range(MAX_TURNS):
            connection, response = engine.begin_turn(delay_s=600)
            turns.enter_context(closing(connection))
            turns.enter_context(closing(response))
        refused = engine.execute("one too many")
        assert refused.error == (503, "UNAVAILABLE")
        assert refused.headers["Retry-After"] == "1"
        assert engine.active
    until(lambda: engine.execute("now there is room").status == 200)
