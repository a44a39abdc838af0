"""Time as an argument, so that tests turn it by hand."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock; the database's clock alone decides what time it is."""

    def monotonic(self) -> float:
        """Seconds since some moment, never backwards."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Returns when `seconds` have passed on this clock."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
