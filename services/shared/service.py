"""How a service's process runs: until a signal, or until one of its loops fails."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import uvloop

from services.shared import log
from services.shared.errors import ServiceError
from services.shared.grpc_server import AddressTaken
from services.shared.settings import CommonSettings, load

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

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
    serving = asyncio.current_task()
    assert serving is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        # Once: a second signal must not cut the orderly end short.
        for number in _SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        serving.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    # Cancelled while it starts, or while it serves: either way what was opened is closed.
    with suppress(asyncio.CancelledError):
        async with service:
            await asyncio.Event().wait()


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the block; its failure ends the block with its error, its end is the block's."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()
