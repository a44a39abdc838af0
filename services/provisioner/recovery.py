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

log = structlog.get_logger(__name__)


class Rows(Protocol):
    async def engines_of_node(self) -> list[Engine]: ...


class Starts(Protocol):
    async def start(self, engine_id: UUID, actor: str) -> Pending | None: ...


async def recover(backend: Backend, rows: Rows, starts: Starts) -> int:
    """Writes a start for every engine whose row says running and whose instance is not; returns how many."""
    alive = {i.engine_id for i in await backend.list() if i.state is InstanceState.RUNNING}
    started = 0
    for engine in await rows.engines_of_node():
        lost = engine.status is EngineStatus.RUNNING and engine.engine_id not in alive
        if lost and await starts.start(engine.engine_id, "system") is not None:
            started += 1
    if started:
        log.info("engines_recovered", started=started, adopted=len(alive))
    return started
