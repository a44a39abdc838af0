"""Watching an engine over breaks of the connection, against a Provisioner that follows a script."""

# ruff: noqa: N802 - gRPC names the methods

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from september.engine.v1.engine_pb2 import Engine
from september.provisioner.v1.provisioner_service_pb2 import WatchEngineRequest, WatchEngineResponse
from september.provisioner.v1.provisioner_service_pb2_grpc import (
    ProvisionerServiceServicer,
    add_ProvisionerServiceServicer_to_server,
)
from services.cli.connection import PLATFORM_KEY, PROVISIONER, Connection
from services.cli.sightings import sightings
from services.cli.var_directory import VarDirectory
from services.shared.errors import EngineNotFound, InvalidPlatformKey, ServiceError, Unavailable
from services.shared.grpc_server import GrpcServer

Step = str | grpc.StatusCode | ServiceError


def sighting(step: str) -> WatchEngineResponse:
    seen = WatchEngineResponse(status=Engine.Status.provisioning, operation="provision", step=step)
    seen.at.GetCurrentTime()
    return seen


class Scripted(ProvisionerServiceServicer):
    """Each watch goes through the next script: sends steps, and ends with an error or by itself."""

    def __init__(self, *scripts: list[Step]) -> None:
        self.scripts = [*scripts]

    async def WatchEngine(self, request: WatchEngineRequest, context: Any) -> AsyncIterator[WatchEngineResponse]:
        for step in self.scripts.pop(0):
            if isinstance(step, grpc.StatusCode):
                await context.abort(step, "the server is going")
            elif isinstance(step, ServiceError):
                raise step
            else:
                yield sighting(step)

    async def StopEngine(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    ProvisionEngine = DestroyEngine = StartEngine = SleepEngine = WakeEngine = StopEngine
    RotateEngineKey = EnsureEngine = StopEngine


Watch = Callable[..., AsyncIterator[str]]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    async def watch(*scripts: list[Step]) -> AsyncIterator[str]:
        server, servicer = GrpcServer("127.0.0.1:0"), Scripted(*scripts)
        add_ProvisionerServiceServicer_to_server(servicer, server.server)
        given = {PROVISIONER: f"127.0.0.1:{server.bind()}", PLATFORM_KEY: "pk"}
        await server.start()
        try:
            async with aclosing(sightings(Connection(given, VarDirectory(tmp_path)), "ada")) as seen:
                async for one in seen:
                    yield one.step
            assert servicer.scripts == []
        finally:
            await server.stop(0)

    return watch


async def test_a_watch_ends_when_the_engine_is_gone(watch: Watch) -> None:
    assert [step async for step in watch(["queued", "removing"])] == ["queued", "removing"]


@pytest.mark.parametrize(
    "loss", [Unavailable("draining"), grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED], ids=repr
)
async def test_a_watch_goes_on_after_a_break_and_repeats_nothing(watch: Watch, loss: Step) -> None:
    scripts = ["queued", "creating", loss], [loss], ["creating", "starting"]
    assert [step async for step in watch(*scripts)] == ["queued", "creating", "starting"]


async def test_an_engine_that_went_during_a_break_is_gone(watch: Watch) -> None:
    scripts = ["queued", grpc.StatusCode.UNAVAILABLE], [EngineNotFound()]
    assert [step async for step in watch(*scripts)] == ["queued"]


@pytest.mark.parametrize("error", [Unavailable("starting"), EngineNotFound()], ids=repr)
async def test_a_watch_that_never_saw_the_engine_fails(watch: Watch, error: ServiceError) -> None:
    with pytest.raises(ServiceError, match=error.message) as raised:
        [step async for step in watch([error])]
    assert raised.value.code == error.code


async def test_no_break_is_made_of_an_error_that_stays(watch: Watch) -> None:
    steps = watch(["queued", InvalidPlatformKey()])
    assert await anext(steps) == "queued"
    with pytest.raises(ServiceError) as raised:
        await anext(steps)
    assert raised.value.code == "INVALID_PLATFORM_KEY"
