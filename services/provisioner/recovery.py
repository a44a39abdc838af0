"""At the start: engines that should run and do not are started again.

They ended while nobody looked: with the host, or with the platform. The order is the
reconciler's: what there is first, the rows second, so that an engine made in between is not
taken for a lost one.
"""

from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, InstanceState
from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.intent import Pending
from services.provisioner.domain.operation import OperationKind

log = structlog.get_logger(__name__)


class Rows(Protocol):
    async def engines_of_node(self) -> list[Engine]: ...


class Begin(Protocol):
    async def begin(
        self, engine_id: UUID, kind: OperationKind, expected: EngineStatus, *, reason: str | None = None
    ) -> Pending | None: ...


async def recover(backend: Backend, rows: Rows, intents: Begin) -> int:
    """Writes a start for every engine whose row says running and whose instance is not; returns how many."""
    alive = {i.engine_id for i in await backend.list() if i.state is InstanceState.RUNNING}
    started = 0
    for engine in await rows.engines_of_node():
        lost = engine.status is EngineStatus.RUNNING and engine.engine_id not in alive
        if lost and await intents.begin(engine.engine_id, OperationKind.START, engine.status, reason="it had ended"):
            started += 1
    if started:
        log.info("engines_recovered", started=started, adopted=len(alive))
    return started
