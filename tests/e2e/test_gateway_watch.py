"""Watching through the gateway: lines as they happen, and an end that tells whether it was one."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from september.engine.v1 import engine_pb2
from september.provisioner.v1 import provisioner_service_pb2 as pb
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub
from tests.e2e import http2
from tests.e2e.gateway_calls import WATCH
from tests.e2e.gateway_process import DEADLINE_S, RESPONSE_HEADERS, Gateway, eventually, running_gateway
from tests.e2e.gateway_services import Context, Services, StreamBehaviour, failing, running_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

STATUS = engine_pb2.Engine.Status
UNAVAILABLE = (503, "UNAVAILABLE", "the service is not available, try again")


def sighting(step: str) -> pb.WatchEngineResponse:
    return pb.WatchEngineResponse(status=STATUS.provisioning, operation="start", step=step)


def line(step: str) -> dict[str, str]:
    return {"status": "provisioning", "operation": "start", "step": step}


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with (
        running_services() as services,
        running_gateway(tmp_path_factory.mktemp("gateway"), services.address, services.address) as gateway,
    ):
        yield Served(gateway, services)


class Engine:
    """An engine whose watchers are told what a test puts; None is its end."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[str | None] = asyncio.Queue()
        self.left = asyncio.Event()

    async def watched(self, context: Context) -> AsyncIterator[Message]:
        try:
            while (step := await self.steps.get()) is not None:
                yield sighting(step)
        except asyncio.CancelledError:
            self.left.set()
            raise


def ending(*steps: str) -> StreamBehaviour:
    """Tells these steps, then the engine is gone."""

    async def behaviour(context: Context) -> AsyncIterator[Message]:
        for step in steps:
            yield sighting(step)

    return behaviour


def breaking(code: str, *steps: str) -> StreamBehaviour:
    """Tells these steps, then fails."""

    async def behaviour(context: Context) -> AsyncIterator[Message]:
        for step in steps:
            yield sighting(step)
        await failing(code, f"what {code} means", 2)(context)

    return behaviour


def timer_of(local_port: int, remote_port: int) -> tuple[int, int]:
    """Kind and rest of the timer that the kernel runs for a connection."""
    wanted = f"0100007F:{local_port:04X} 0100007F:{remote_port:04X}"
    (row,) = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines() if wanted in row]
    kind, when = row[5].split(":")
    return int(kind, 16), int(when, 16)


async def next_of(lines: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(lines)


async def test_every_sighting_is_a_line_at_once(served: Served) -> None:
    engine = Engine()
    engine.steps.put_nowait("queued")
    async with served.gateway.lines(f"/engines/{served.services.on(engine.watched)}/watch") as answer:
        assert answer.status == 200
        assert {name for name, _ in answer.headers} <= RESPONSE_HEADERS | {"transfer-encoding"}
        assert ("content-type", "application/x-ndjson") in answer.headers
        lines = aiter(answer)
        assert await next_of(lines) == line("queued")
        # Nothing more is told before this line has come.
        engine.steps.put_nowait("creating")
        assert await next_of(lines) == line("creating")
        for step in ("probing 1", 'quotes " and [brackets], and \n newlines', ""):
            engine.steps.put_nowait(step)
        assert [await next_of(lines) for _ in range(3)] == [
            line("probing 1"),
            line('quotes " and [brackets], and \n newlines'),
            line(""),
        ]
        engine.steps.put_nowait(None)
        with pytest.raises(StopAsyncIteration):
            await next_of(lines)


async def test_lines_have_the_contracts_shape(served: Served) -> None:
    async def behaviour(context: Context) -> AsyncIterator[Message]:
        message = pb.WatchEngineResponse(status=STATUS.running)
        message.at.FromJsonString("2026-02-03T04:05:06.789Z")
        yield message

    answer = await served.gateway.rest(*WATCH.rest_call(served.services.on(behaviour)))
    assert answer.body == b'{"status":"running","operation":"","step":"","at":"2026-02-03T04:05:06.789Z"}\n'


async def test_a_watch_of_an_engine_that_is_gone_at_once_is_empty(served: Served) -> None:
    answer = await served.gateway.rest(*WATCH.rest_call(served.services.on(ending())))
    assert (answer.status, answer.body) == (200, b"")
    assert answer.header("content-type") == "application/x-ndjson"


@pytest.mark.parametrize(
    ("code", "status"),
    [("ENGINE_NOT_FOUND", 404), ("INVALID_PLATFORM_KEY", 401), ("INVALID_REQUEST", 400), ("UNAVAILABLE", 503)],
)
async def test_an_error_before_the_first_line_is_like_any_other(served: Served, code: str, status: int) -> None:
    answer = await served.gateway.rest(*WATCH.rest_call(served.services.on(breaking(code))))
    assert answer.error() == (status, code, f"what {code} means")
    assert answer.header("retry-after") == "2"


@pytest.mark.parametrize("steps", [["queued"], ["queued", "creating"]])
@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL"])
async def test_an_error_after_a_line_breaks_the_answer_off(served: Served, code: str, steps: list[str]) -> None:
    user_id = served.services.on(breaking(code, *steps))
    async with served.gateway.lines(f"/engines/{user_id}/watch") as answer:
        lines = aiter(answer)
        assert [await next_of(lines) for _ in steps] == [line(step) for step in steps]
        with pytest.raises(asyncio.IncompleteReadError):
            await next_of(lines)


async def test_a_service_that_goes_away_breaks_the_answer_off(tmp_path: Path) -> None:
    async with running_services() as services, running_gateway(tmp_path, services.address, services.address) as gateway:
        engine = Engine()
        engine.steps.put_nowait("queued")
        async with gateway.lines(f"/engines/{services.on(engine.watched)}/watch") as answer:
            lines = aiter(answer)
            await next_of(lines)
            await services.stop()
            with pytest.raises(asyncio.IncompleteReadError):
                await next_of(lines)
        assert (await gateway.rest(*WATCH.rest_call("u1"))).own_error() == UNAVAILABLE


async def test_a_caller_that_leaves_ends_the_call_to_the_service(served: Served) -> None:
    engine = Engine()
    engine.steps.put_nowait("queued")
    async with served.gateway.lines(f"/engines/{served.services.on(engine.watched)}/watch") as answer:
        await next_of(aiter(answer))
        assert not engine.left.is_set()
    await asyncio.wait_for(engine.left.wait(), DEADLINE_S)


async def test_a_caller_that_leaves_before_the_first_line_ends_the_call_too(served: Served) -> None:
    engine = Engine()
    watched = asyncio.create_task(served.gateway.rest(*WATCH.rest_call(user_id := served.services.on(engine.watched))))

    async def called() -> list[Any]:
        return served.services.calls[user_id]

    await eventually(called)
    watched.cancel()
    await asyncio.wait_for(engine.left.wait(), DEADLINE_S)


async def test_a_watch_outlasts_what_other_calls_may_take(tmp_path: Path) -> None:
    def impatient(config: str) -> str:
        return re.sub(r"(cluster: \w+, timeout: |stream_idle_timeout: )[1-9][\d.]*s", r"\g<1>0.1s", config)

    async def never(context: Context) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, impatient) as gateway,
    ):
        engine = Engine()
        path, slow = f"/engines/{services.on(engine.watched)}/watch", f"/engines/{services.on(never)}/stop"

        async def wait() -> None:
            """As long as it takes for other calls to be given up, several times over."""
            for _ in range(3):
                assert (await gateway.rest("POST", slow)).own_error() == UNAVAILABLE

        async def late_step() -> None:
            await wait()
            engine.steps.put_nowait("queued")

        told = asyncio.create_task(late_step())
        async with gateway.lines(path) as answer:
            lines = aiter(answer)
            assert await next_of(lines) == line("queued")
            await told
            await late_step()
            assert await next_of(lines) == line("queued")


async def test_a_watchers_connection_is_kept_alive_so_that_vanished_callers_are_found(served: Served) -> None:
    engine = Engine()
    engine.steps.put_nowait("queued")
    async with served.gateway.lines(f"/engines/{served.services.on(engine.watched)}/watch") as answer:
        await next_of(aiter(answer))
        port = int(served.gateway.address.split(":")[1])
        kind, hundredths_of_a_second = timer_of(port, answer.local_port)
        assert kind == 2  # keepalive
        assert hundredths_of_a_second <= 6000


async def test_watches_take_no_other_calls_place(tmp_path: Path) -> None:
    def small(config: str) -> str:
        assert "max_requests: 1000," in config
        return config.replace("max_requests: 1000,", "max_requests: 1,")

    async with (
        running_services() as services,
        running_gateway(tmp_path, services.address, services.address, small) as gateway,
    ):
        engine = Engine()
        engine.steps.put_nowait("queued")
        path = f"/engines/{services.on(engine.watched)}/watch"
        async with gateway.lines(path) as answer:
            await next_of(aiter(answer))
            assert (await gateway.rest("GET", path)).own_error() == UNAVAILABLE
            assert (await gateway.rest("POST", "/engines/a/stop")).status == 200
        await asyncio.wait_for(engine.left.wait(), DEADLINE_S)


@pytest.mark.parametrize(
    ("behaviour", "ends"),
    [(ending("queued"), http2.END_STREAM), (breaking("UNAVAILABLE", "queued"), None)],
    ids=["end", "error"],
)
async def test_an_http2_caller_of_rest_can_tell_an_end_from_an_error(
    served: Served, behaviour: StreamBehaviour, ends: int | None
) -> None:
    path = f"/engines/{served.services.on(behaviour)}/watch"
    request = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path)]
    host, port = served.gateway.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + http2.headers(1, request, end=True))
    body, last = b"", None
    async with asyncio.timeout(DEADLINE_S):
        async for kind, flags, stream, payload in http2.frames(reader):
            if stream != 1:
                continue
            body += payload if kind == http2.DATA else b""
            last = (kind, flags & http2.END_STREAM)
            if kind == http2.RST_STREAM or flags & http2.END_STREAM:
                break
    writer.close()
    await writer.wait_closed()
    assert json.loads(body) == line("queued")
    # No trailers: data ends the stream, or a reset does.
    assert last == ((http2.DATA, http2.END_STREAM) if ends else (http2.RST_STREAM, 0))


async def watched_over_grpc(served: Served, user_id: str) -> tuple[list[str], grpc.StatusCode, str, dict[str, Any]]:
    """Steps, and status, message and trailers of the end."""
    steps = []
    async with grpc.aio.insecure_channel(served.gateway.address) as channel:
        call = ProvisionerServiceStub(channel).WatchEngine(pb.WatchEngineRequest(user_id=user_id))
        with suppress(grpc.aio.AioRpcError):
            async for message in call:
                steps.append(message.step)  # noqa: PERF401 - those before an error count
        return steps, await call.code(), await call.details(), dict(await call.trailing_metadata() or ())


@pytest.mark.parametrize("steps", [[], ["queued"], ["queued", "creating"]])
async def test_over_grpc_an_end_is_ok(served: Served, steps: list[str]) -> None:
    seen, code, _, _ = await watched_over_grpc(served, served.services.on(ending(*steps)))
    assert (seen, code) == (steps, grpc.StatusCode.OK)


@pytest.mark.parametrize("steps", [[], ["queued"], ["queued", "creating"]])
async def test_over_grpc_an_error_has_its_status_and_details(served: Served, steps: list[str]) -> None:
    seen, code, message, trailers = await watched_over_grpc(served, served.services.on(breaking("UNAVAILABLE", *steps)))
    assert (seen, code, message) == (steps, grpc.StatusCode.UNAVAILABLE, "what UNAVAILABLE means")
    assert b"platform.september" in trailers["grpc-status-details-bin"]


async def test_over_grpc_a_caller_that_leaves_ends_the_call_to_the_service(served: Served) -> None:
    engine = Engine()
    engine.steps.put_nowait("queued")
    request = pb.WatchEngineRequest(user_id=served.services.on(engine.watched))
    async with grpc.aio.insecure_channel(served.gateway.address) as channel:
        call = ProvisionerServiceStub(channel).WatchEngine(request)
        assert (await next_of(aiter(call))).step == "queued"
        engine.steps.put_nowait("creating")
        assert (await next_of(aiter(call))).step == "creating"
        call.cancel()
        await asyncio.wait_for(engine.left.wait(), DEADLINE_S)
