"""Tells those who wait for operations that they have ended.

Invariant: whoever waits learns of the end within a poll, whichever process brought it about;
notifications only make it sooner. All who wait share one query.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.domain.operation import PATIENCE_S, Settled
from services.shared.errors import Unavailable
from services.shared.loops import Pulse

log = structlog.get_logger(__name__)

_POLL_S = 0.5
_LOOK_S = 0.05


class Ends(Protocol):
    async def settled(self, operation_ids: Collection[UUID]) -> list[Settled]: ...


class OperationWatch:
    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._waiting: defaultdict[UUID, set[asyncio.Future[Settled]]] = defaultdict(set)
        self._pulse = Pulse()

    def wake(self) -> None:
        """Something may have ended: look now and not at the next poll."""
        if self._waiting:
            self._pulse.give()

    async def wait(self, operation_id: UUID, timeout_s: float) -> Settled:
        """How the operation ends.

        Raises:
            TimeoutError: it has not ended within `timeout_s` seconds.
            Unavailable: it is delayed; whoever asks again joins it.
        """
        future: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._waiting[operation_id].add(future)
        # It may have ended before anybody waited; seldom, and a moment later is soon enough.
        asyncio.get_running_loop().call_later(_LOOK_S, self._pulse.give)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            futures = self._waiting.get(operation_id, set())
            futures.discard(future)
            if not futures:
                self._waiting.pop(operation_id, None)

    def settle(self, settled: Settled) -> None:
        """Tells those who wait for it."""
        for future in self._waiting.pop(settled.operation_id, ()):
            if not future.done():
                future.set_result(settled)

    def delay(self, operation_id: UUID, why: Unavailable) -> None:
        """Tells those who wait for it that they would wait for long."""
        for future in self._waiting.pop(operation_id, ()):
            if not future.done():
                future.set_exception(Unavailable(why.message))

    async def run(self) -> None:
        reached_at = time.monotonic()
        while True:
            try:
                await self.tick()
                reached_at = time.monotonic()
            except Unavailable as error:
                log.warning("operations_unreachable", waiting=len(self._waiting))
                if time.monotonic() > reached_at + PATIENCE_S:
                    for operation_id in list(self._waiting):
                        self.delay(operation_id, error)
            await self._pulse.wait(_POLL_S)

    async def tick(self) -> None:
        """Looks once for the ends of all that is waited for."""
        if self._waiting:
            for settled in await self._ends.settled(list(self._waiting)):
                self.settle(settled)
