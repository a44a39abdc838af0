"""A server as both services run it: what becomes of calls whose handlers are cancelled."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from services.shared.grpc_server import GrpcServer
from tests.harness import reason

UNARY = "/september.provisioner.v1.ProvisionerService/StartEngine"
STREAM = "/september.provisioner.v1.ProvisionerService/WatchEngine"
DEADLINE_S = 10.0
Behaviour = Callable[[], AsyncIterator[bytes]]


class Handlers(grpc.GenericRpcHandler):
    """Handles every method, of the unary ones all but the stream's.

    Args:
        behaviour: what it does, with the messages that it answers.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.tasks: list[asyncio.Task[Any]] = []
        self._behaviour = behaviour

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == STREAM:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        return [message async for message in self._stream(request, context)][-1]

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        async for message in self._behaviour():
            yield message


@asynccontextmanager
async def serving(handlers: Handlers) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer("127.0.0.1:0")
    server.server.add_generic_rpc_handlers((handlers,))
    port = server.bind()
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def called(channel: grpc.aio.Channel, method: str, timeout_s: float = DEADLINE_S) -> list[bytes]:
    """The messages of the answer."""
    metadata = (("x-request-id", "r-1"),)
    if method == STREAM:
        stream: Any = channel.unary_stream(method)
        return [message async for message in stream(b"", metadata=metadata, timeout=timeout_s)]
    unary: Any = channel.unary_unary(method)
    return [await unary(b"", metadata=metadata, timeout=timeout_s)]


async def cancelled_at_once() -> AsyncIterator[bytes]:
    raise asyncio.CancelledError("secret")
    yield b""


async def cancelled_with_what_it_waits_for() -> AsyncIterator[bytes]:
    yield b"one"
    waited_for = asyncio.create_task(asyncio.Event().wait())
    waited_for.cancel()
    await waited_for


@pytest.mark.parametrize("method", [UNARY, STREAM])
@pytest.mark.parametrize("behaviour", [cancelled_at_once, cancelled_with_what_it_waits_for])
async def test_a_cancellation_inside_of_a_handler_is_a_bug_and_answered(method: str, behaviour: Behaviour) -> None:
    with capture_logs() as logs:
        async with serving(Handlers(behaviour)) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await called(channel, method)
    assert (error.value.code(), error.value.details()) == (
        grpc.StatusCode.INTERNAL,
        "internal error; request id r-1",
    )
    assert reason(error.value) == "INTERNAL"
    assert [event["event"] for event in logs] == ["call_cancelled_inside"]


@pytest.mark.parametrize("method", [UNARY, STREAM])
@pytest.mark.parametrize("leaves", ["cancels", "has a deadline"])
async def test_a_caller_who_leaves_is_no_bug(method: str, leaves: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def waiting() -> AsyncIterator[bytes]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        yield b""

    handlers = Handlers(waiting)
    with capture_logs() as logs:
        async with serving(handlers) as channel, asyncio.timeout(DEADLINE_S):
            call = asyncio.create_task(called(channel, method, DEADLINE_S if leaves == "cancels" else 0.2))
            await begun.wait()
            if leaves == "cancels":
                call.cancel()
            await asyncio.wait([call])
            await ended.wait()
            await asyncio.wait(handlers.tasks)
    assert logs == []


async def test_a_method_that_nobody_has_a_role_for_is_not_served_though_it_is_there() -> None:
    async def answering() -> AsyncIterator[bytes]:
        yield b"one"

    async with serving(Handlers(answering)) as channel:
        assert await called(channel, UNARY) == await called(channel, STREAM) == [b"one"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await called(channel, f"{UNARY}s")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
