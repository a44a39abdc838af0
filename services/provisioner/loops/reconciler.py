"""Makes the registry and what exists agree again.

Invariant: the backend is listed before the rows are read. What was made in between has a row by
then and is not in the list, so that it is never taken for a stray; and what seems lost because the
list is the older one is looked at once more.

Whatever has an open operation is left to it. Instances without a row are removed only when they are
seen a second time, a pass later, and only if they are few: if many seem to belong to nobody, it is
the registry that is not the right one. Their volumes stay, unless their destroy was asked for.
"""

import asyncio
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, InstanceState
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import OperationKind
from services.provisioner.domain.registered import Registered
from services.provisioner.loops.beginning import Begin
from services.provisioner.loops.skipping import skipping
from services.provisioner.metrics import BRAKE, REPAIRS, STRAYS, STRAYS_REMOVED
from services.shared.errors import ServiceError
from services.shared.failpoints import reached

log = structlog.get_logger(__name__)

# So many strays are removed in one pass, and no more.
_FEW = 3
_MOST_REMOVED = 0.05
_RETRY_S = 5.0


class Rows(Protocol):
    async def registered(self, listed: Collection[UUID]) -> list[Registered]: ...
    async def unknown(self, engine_ids: Collection[UUID]) -> dict[UUID, bool]: ...
    async def set_deep_asleep(self, engine_id: UUID, deep_asleep: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Repair:
    """What makes a row and its instance agree: an operation, or a note of how deep a sleeper sleeps."""

    change: OperationKind | bool
    reason: str


def repair_of(row: Registered, state: InstanceState | None) -> Repair | None:
    """What it takes to make them agree; None if they do, or if something else sees to it.

    Args:
        state: of the instance; None if there is none.
    """
    match row.status, state:
        case EngineStatus.RUNNING, InstanceState.FROZEN:
            return Repair(OperationKind.START, "its instance was frozen")
        case EngineStatus.RUNNING, InstanceState.CREATED | InstanceState.EXITED | None:
            return Repair(OperationKind.START, "its instance had ended")
        case EngineStatus.SLEEPING, InstanceState.RUNNING:
            return Repair(OperationKind.WAKE, "its instance was running")
        case EngineStatus.SLEEPING, InstanceState.FROZEN if row.deep_asleep:
            return Repair(False, "its instance was frozen")
        case EngineStatus.SLEEPING, InstanceState.CREATED | InstanceState.EXITED | None if not row.deep_asleep:
            return Repair(True, "its instance had ended")
        case EngineStatus.STOPPED, InstanceState.RUNNING | InstanceState.FROZEN:
            return Repair(OperationKind.STOP, "its instance was running")
        case EngineStatus.PROVISIONING, _:
            return Repair(OperationKind.START, "nobody was booting it")
        case EngineStatus.DESTROYING, _:
            return Repair(OperationKind.DESTROY, "nobody was destroying it")
    return None


class Reconciler:
    """Args:
    rows: what the registry says.
    intents: writes the operations.
    backend: what exists.
    interval_s: seconds between two passes.
    """

    def __init__(
        self,
        rows: Rows,
        intents: Begin,
        backend: Backend,
        *,
        interval_s: float,
    ) -> None:
        self._rows = rows
        self._intents = intents
        self._backend = backend
        self._interval_s = interval_s
        self._strays: Set[UUID] = frozenset()

    async def run(self) -> None:
        # What was seen in an earlier term is too old.
        self._strays = frozenset()
        while True:
            pause = self._interval_s
            try:
                await self.tick()
            except ServiceError as error:
                log.warning("reconcile_postponed", reason=error.message)
                pause = min(self._interval_s, _RETRY_S)
            await asyncio.sleep(pause)

    async def tick(self) -> None:
        """One pass over all engines of the node.

        Raises:
            Unavailable: registry or backend can't be reached.
        """
        states = await self._states()
        reached("reconcile.listed")
        rows = await self._rows.registered(states)
        unlike = [row for row in rows if not row.busy and repair_of(row, states.get(row.engine_id))]
        if unlike:
            await self._repair(unlike, await self._states())
        unregistered = states.keys() - {row.engine_id for row in rows}
        strays = await self._rows.unknown(unregistered) if unregistered else {}
        await self._remove(strays.keys(), among=len(states))

    async def _states(self) -> dict[UUID, InstanceState]:
        return {instance.engine_id: instance.state for instance in await self._backend.list()}

    async def _repair(self, rows: list[Registered], states: dict[UUID, InstanceState]) -> None:
        for row in rows:
            repair = repair_of(row, states.get(row.engine_id))
            if repair is None:
                continue
            REPAIRS.inc()
            log.warning("engine_unlike_its_row", engine_id=str(row.engine_id), status=row.status, reason=repair.reason)
            with skipping(row.engine_id):
                if isinstance(repair.change, OperationKind):
                    await self._intents.begin(
                        row.engine_id, repair.change, EngineStatus(row.status), reason=repair.reason
                    )
                else:
                    await self._rows.set_deep_asleep(row.engine_id, repair.change)
                reached("reconcile.begun")

    async def _remove(self, strays: Set[UUID], *, among: int) -> None:
        """Removes the strays that the pass before has seen too, unless they are too many of all instances."""
        for engine_id in strays - self._strays:
            log.warning("stray_seen", engine_id=str(engine_id))
        doomed = strays & self._strays
        self._strays = strays
        too_many = len(doomed) > max(_FEW, _MOST_REMOVED * among)
        STRAYS.set(len(strays))
        BRAKE.set(too_many)
        if too_many:
            log.error("reconcile_brake", strays=len(doomed), instances=among)
            return
        for engine_id in doomed:
            with skipping(engine_id, "stray_skipped"):
                # As late as can be: is it unknown still, and the pass still ours to make?
                still = await self._rows.unknown([engine_id])
                if engine_id not in still:
                    continue
                await self._backend.remove(engine_id, volume=still[engine_id])
                reached("reconcile.removed")
                STRAYS_REMOVED.inc()
                log.warning("stray_removed", engine_id=str(engine_id), volume=still[engine_id])
