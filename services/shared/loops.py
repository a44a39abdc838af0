"""Background work of a service."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class LoopEnded(Exception):
    """A loop that must run for ever returned."""


async def supervise(**loops: Coroutine[Any, Any, None]) -> NoReturn:
    """Runs loops side by side until cancelled; one that raises *or returns* ends them all.

    A service without one of its loops looks alive and is not; better that it dies and is
    started again.

    Args:
        loops: coroutine of each loop, by the name that it has in an error.

    Raises:
        ExceptionGroup: of what the loops raised, `LoopEnded` for one that returned.
    """

    async def guarded(name: str, loop: Coroutine[Any, Any, None]) -> None:
        await loop
        raise LoopEnded(name)

    async with asyncio.TaskGroup() as group:
        for name, loop in loops.items():
            group.create_task(guarded(name, loop), name=name)
    raise LoopEnded("no loop was given")


class Broadcast:
    """Pulses for everybody who listens at the moment."""

    def __init__(self) -> None:
        self._listeners: set[Pulse] = set()

    def give(self) -> None:
        for listener in self._listeners:
            listener.give()

    @contextmanager
    def listener(self) -> Iterator["Pulse"]:
        """A pulse that is given with every broadcast within the block."""
        pulse = Pulse()
        self._listeners.add(pulse)
        try:
            yield pulse
        finally:
            self._listeners.discard(pulse)


class Pulse:
    """Wakes one waiting loop early; a pulse given meanwhile is not lost."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def give(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next pulse, or after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()
