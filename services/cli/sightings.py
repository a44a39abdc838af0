"""An engine as it changes: for `watch`, and for whoever waits for a boot."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from september.engine.v1.engine_pb2 import Engine
from september.provisioner.v1.provisioner_service_pb2 import WatchEngineRequest, WatchEngineResponse
from services.cli.connection import Connection
from services.cli.output import Output, enum_name
from services.shared.errors import ServiceError

_PAUSE_S = 0.3


async def sightings(connection: Connection, user_id: str) -> AsyncGenerator[WatchEngineResponse, None]:
    """A user's engine as it is, and again whenever that changes, until it is gone.

    Once it has been seen, a Provisioner that is away is waited for.

    Raises:
        ServiceError: it can't be watched.
    """
    last: WatchEngineResponse | None = None
    while True:
        try:
            async with connection.provisioner() as provisioner:
                stream = provisioner.WatchEngine(
                    WatchEngineRequest(user_id=user_id), metadata=connection.platform_key()
                )
                try:
                    async for sighting in stream:
                        # The first after a break may be nothing new.
                        if last is None or _what(sighting) != _what(last):
                            yield sighting
                        last = sighting
                finally:
                    # A channel that is closed waits for its calls.
                    stream.cancel()
            return
        except ServiceError as error:
            if last is not None and error.code == "ENGINE_NOT_FOUND":
                # It went while nobody could tell.
                return
            if last is None or error.code != "UNAVAILABLE":
                raise
        await asyncio.sleep(_PAUSE_S)


@asynccontextmanager
async def progress(connection: Connection, output: Output, user_id: str) -> AsyncIterator[None]:
    """While inside, shows whoever watches what is done to a user's engine, and for how long."""
    if not output.interactive:
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(user_id)

        async def follow() -> None:
            while True:
                # The engine may not exist yet, and what is shown beside a call never fails it.
                with suppress(ServiceError):
                    async with aclosing(sightings(connection, user_id)) as seen:
                        async for sighting in seen:
                            shown.update(task, description=f"{user_id}: {_describe(sighting)}")
                await asyncio.sleep(_PAUSE_S)

        following = asyncio.create_task(follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.wait({following})


def _what(sighting: WatchEngineResponse) -> tuple[int, str, str]:
    return sighting.status, sighting.operation, sighting.step


def _describe(sighting: WatchEngineResponse) -> str:
    if sighting.operation:
        return f"{sighting.operation} {sighting.step}"
    return enum_name(Engine.Status.DESCRIPTOR, sighting.status)
