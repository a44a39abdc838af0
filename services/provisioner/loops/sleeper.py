"""Puts idle engines to sleep, and stops those that have slept for long.

Invariant: it only chooses. Whether an engine really may sleep is found out by the operation,
which announces, waits and looks again; so a choice that was wrong costs nothing but the try.

Engines that say nothing of their work are judged by their counters: one is chosen only if they
have not moved from one look to the next.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, Usage
from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.operation import OperationKind
from services.provisioner.loops.beginning import Begin
from services.provisioner.loops.skipping import skipping
from services.provisioner.ports import EngineClient
from services.provisioner.sleep import work_between
from services.shared.errors import ServiceError
from services.shared.failpoints import reached

log = structlog.get_logger(__name__)

_BATCH = 100


class Candidates(Protocol):
    async def idle_engines(self, limit: int) -> list[Engine]: ...
    async def light_sleepers(self, deep_sleep_after_s: float, limit: int) -> list[Engine]: ...
    async def mark_busy(self, engine_id: UUID, reason: str) -> None: ...


class Sleeper:
    """Args:
    candidates: finds engines by the registry's clock.
    intents: writes the operations.
    backend: knows the counters.
    engines: asks engines whether they are at work.
    interval_s: seconds between two looks.
    deep_sleep_after_s: seconds of sleep after which an engine is stopped.
    """

    def __init__(
        self,
        candidates: Candidates,
        intents: Begin,
        backend: Backend,
        engines: EngineClient,
        *,
        interval_s: float,
        deep_sleep_after_s: float,
    ) -> None:
        self._candidates = candidates
        self._intents = intents
        self._backend = backend
        self._engines = engines
        self._interval_s = interval_s
        self._deep_sleep_after_s = deep_sleep_after_s
        self._before: dict[UUID, Usage] = {}

    async def run(self) -> None:
        # What was seen in an earlier term is too old.
        self._before = {}
        while True:
            try:
                await self.tick()
            except ServiceError as error:
                log.warning("sleeper_postponed", reason=error.message)
            await asyncio.sleep(self._interval_s)

    async def tick(self) -> None:
        """One look at all candidates."""
        seen: dict[UUID, Usage] = {}
        for engine in await self._candidates.idle_engines(_BATCH):
            with _unless_it_fails(engine):
                await self._consider(engine, seen)
        self._before = seen
        for engine in await self._candidates.light_sleepers(self._deep_sleep_after_s, _BATCH):
            with _unless_it_fails(engine):
                await self._intents.begin(engine.engine_id, OperationKind.DEEP_SLEEP, EngineStatus.SLEEPING)
                reached("sleeper.begun")

    async def _consider(self, engine: Engine, seen: dict[UUID, Usage]) -> None:
        now = await self._backend.usage(engine.engine_id)
        before = self._before.get(engine.engine_id)
        health = await self._engines.health(engine.url)
        if not health.healthy:
            return  # The health loop's to look at.
        if health.active:
            await self._candidates.mark_busy(engine.engine_id, "it said that it was at work")
        elif before is None:
            seen[engine.engine_id] = now
        elif (work := work_between(before, now)) is not None:
            await self._candidates.mark_busy(engine.engine_id, work)
        else:
            await self._intents.begin(
                engine.engine_id,
                OperationKind.SLEEP,
                EngineStatus.RUNNING,
                reason="idle for as long as its policy says",
            )


@contextmanager
def _unless_it_fails(engine: Engine) -> Iterator[None]:
    """One engine that can't be looked at is no reason to keep the others awake."""
    with skipping(engine.engine_id):
        try:
            yield
        except ServiceError as error:
            log.warning("sleeper_skipped", engine_id=str(engine.engine_id), reason=error.message)
