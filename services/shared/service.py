"""How a service's process runs: until a signal, or until one of its loops fails."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import uvloop

from services.shared import log
from services.shared.errors import ServiceError
from services.shared.grpc_server import AddressTaken
from services.shared.settings import CommonSettings, load

S = TypeVar("S", bound=CommonSettings)


def run(name: str, settings_type: type[S], serve: Callable[[S], AbstractAsyncContextManager[int]]) -> None:
    """Loads settings and serves until SIGTERM or SIGINT.

    Args:
        name: of the service, in its logs.
        settings_type: what it is told by its environment.
        serve: opens the service on entry and closes it, orderly, on exit.
    """
    settings = load(settings_type)
    log.configure(name, settings.log_level)
    try:
        uvloop.run(_until_signal(serve(settings)))
    except (AddressTaken, ServiceError) as error:
        sys.exit(f"{name}: {error}")


async def _until_signal(service: AbstractAsyncContextManager[int]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with service:
        await stop.wait()


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the block; its failure ends the block with its error, its end is the block's."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()
