"""Starts failed engines again when their next restart is due.

Invariant: the row alone says when that is, and of several processes that see it one begins; so
restarts go on where they were, whichever process sees to them.
"""

import asyncio
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import OperationKind
from services.provisioner.loops.beginning import Begin
from services.provisioner.loops.skipping import skipping
from services.shared.errors import ServiceError, Unavailable
from services.shared.failpoints import reached

log = structlog.get_logger(__name__)

_PAUSE_S = 0.5
_BATCH = 100


class Due(Protocol):
    async def due_restarts(self, limit: int) -> list[UUID]: ...


class Restarter:
    """Args:
    due: knows the restarts that are due.
    intents: writes the operations.
    backend: runs the engines.
    """

    def __init__(self, due: Due, intents: Begin, backend: Backend) -> None:
        self._due = due
        self._intents = intents
        self._backend = backend

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_PAUSE_S)
            try:
                await self.tick()
            except Unavailable as error:
                log.warning("restarts_postponed", reason=error.message)

    async def tick(self) -> None:
        """Begins the restarts that are due."""
        postponed = 0
        for engine_id in await self._due.due_restarts(_BATCH):
            with skipping(engine_id):
                try:
                    # Restarts are counted: none is spent on a backend that does not answer.
                    await self._backend.inspect(engine_id)
                    await self._intents.begin(engine_id, OperationKind.RESTART, EngineStatus.FAILED)
                    reached("restarter.begun")
                except ServiceError:
                    postponed += 1
        if postponed:
            log.warning("restarts_postponed", engines=postponed)
