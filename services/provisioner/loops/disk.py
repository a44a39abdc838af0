"""Watches the room for engines' data.

Invariant: below what has to stay free no engine is begun, and those that are there go on, start and
are removed as ever. What is decided upon is a second old, so what has to stay free must be more than
the engines of a second take.
"""

import asyncio
import math

import structlog

from services.provisioner.backends.base import Backend
from services.provisioner.metrics import DISK_FREE
from services.shared.errors import Unavailable

log = structlog.get_logger(__name__)

_PERIOD_S = 1.0
# Room does not come back by itself, or soon.
_RETRY_AFTER_S = 30


class Disk:
    """Args:
    backend: knows where engines' data is.
    min_free_bytes: what has to stay free for a new engine to be begun.
    """

    def __init__(self, backend: Backend, *, min_free_bytes: int) -> None:
        self._backend = backend
        self._min_free_bytes = min_free_bytes
        self._short = False

    async def run(self) -> None:
        while True:
            await self.tick()
            await asyncio.sleep(_PERIOD_S)

    async def tick(self) -> None:
        """Looks once."""
        free = await self._backend.free_bytes()
        short = free is not None and free < self._min_free_bytes
        if short and not self._short:
            log.warning("disk_short", free_bytes=free, min_free_bytes=self._min_free_bytes)
        self._short = short
        DISK_FREE.set(math.nan if free is None else free)

    def check(self) -> None:
        """Raises Unavailable if there is too little room for one more engine."""
        if self._short:
            raise Unavailable("no disk space is left for one more engine", retry_after_s=_RETRY_AFTER_S)
