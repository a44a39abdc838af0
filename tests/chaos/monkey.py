"""Kills, stops and restarts the parts of a platform at random moments."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import cycle

from tests.harness import Platform, Service

# How long a part is stopped: up to three leases.
_LONGEST_STOP_S = 3.0
_LONGEST_PEACE_S = 0.5


class Part:
    """A service that comes back at its address.

    Args:
        start: starts it, with these settings besides.
        listen: the variable of its address.
    """

    def __init__(self, start: Callable[..., Service], listen: str) -> None:
        self._start = start
        self.service = start()
        self._settings = {listen: self.service.address}

    async def kill(self) -> None:
        await asyncio.to_thread(self.service.kill)
        await self._come_back()

    async def end(self) -> None:
        await asyncio.to_thread(self.service.terminate)
        await self._come_back()

    async def stop(self, seconds: float) -> None:
        """Stops it, and lets it go on after so long."""
        os.kill(self.service.process.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(self.service.process.pid, signal.SIGCONT)

    async def _come_back(self) -> None:
        self.service = await asyncio.shield(asyncio.to_thread(self._start, **self._settings))


def parts_of(platform: Platform, *versions: Mapping[str, str]) -> list[Part]:
    """Two Provisioners, and an Admission that calls the first.

    Args:
        versions: settings that take turns at every start.
    """
    turns = cycle(versions or [{}])

    def provisioner(**settings: str) -> Service:
        return platform.provisioner(**settings, **next(turns))

    def admission(**settings: str) -> Service:
        return platform.admission(first, **settings, **next(turns))

    provisioners = [Part(provisioner, "ORCH_PROVISIONER_LISTEN") for _ in range(2)]
    first = provisioners[0].service
    return [*provisioners, Part(admission, "ORCH_ADMISSION_LISTEN")]


@asynccontextmanager
async def mischief(
    parts: Sequence[Part], chance: random.Random, *others: Callable[[], None]
) -> AsyncIterator[list[str]]:
    """Within the block things happen to the parts, and before all `others`; gives the list of what did."""
    done: list[str] = []
    over = asyncio.Event()

    async def go_on() -> None:
        for other in others:
            await asyncio.to_thread(other)
            done.append(other.__name__)
        while not over.is_set():
            # The moment is the point here, not a wait for anything.
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0, _LONGEST_PEACE_S)):
                    await over.wait()
            victim = chance.choice(parts)
            deed = chance.choice(["kill", "end", "stop"])
            match deed:
                case "kill":
                    await victim.kill()
                case "end":
                    await victim.end()
                case _:
                    await victim.stop(chance.uniform(0, _LONGEST_STOP_S))
            done.append(deed)

    async with asyncio.TaskGroup() as group:
        group.create_task(go_on())
        try:
            yield done
        finally:
            over.set()
