"""How an operation is carried out, step by step.

Every step may be repeated: after a crash in the middle of it another process takes the
operation over and does the step again. Between any two effects the lease is checked, so that a
process which has lost it, or whose operation has to give way, stops there.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from services.provisioner.backends.base import InstanceState
from services.provisioner.boot import Boot
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import (
    SYSTEM,
    GiveWay,
    Operation,
    OperationKind,
    Outcome,
    Settled,
    Step,
    failure_of,
)
from services.provisioner.domain.transitions import BOOTS
from services.provisioner.key_rotation import KeyRotation
from services.provisioner.lease import Lease
from services.provisioner.ports import Backend, OperationLog
from services.provisioner.sleep import FallAsleep
from services.shared.errors import BackendError
from services.shared.failpoints import reached

Execute = Callable[[Operation, Lease], Awaitable[Settled]]

STOP_GRACE_S = 30.0
"""Seconds from SIGTERM to SIGKILL."""


class Executor:
    """Carries operations out.

    Args:
        store: where steps and ends are written.
        backend: runs the engines.
        boot: brings engines up.
        fall_asleep: puts engines to sleep.
        key_rotation: gives engines new keys.
    """

    def __init__(
        self,
        store: OperationLog,
        backend: Backend,
        boot: Boot,
        fall_asleep: FallAsleep,
        key_rotation: KeyRotation,
    ) -> None:
        self._store = store
        self._backend = backend
        self._boot = boot
        self._executes: Mapping[OperationKind, Execute] = {
            **dict.fromkeys(BOOTS, self._bring_up),
            OperationKind.STOP: self._stop,
            OperationKind.DEEP_SLEEP: self._stop,
            OperationKind.SLEEP: fall_asleep.execute,
            OperationKind.ROTATE_KEY: key_rotation.execute,
            OperationKind.DESTROY: self._destroy,
            OperationKind.BACKUP: self._let_go,
        }

    async def execute(self, operation: Operation, lease: Lease) -> Settled:
        """Carries the operation out to its end, good or bad.

        Raises:
            LeaseLost: stopped, because another process may be working on it.
            Unavailable: backend or registry can't be reached now; the operation is still open.
        """
        try:
            return await self._executes[operation.kind](operation, lease)
        except GiveWay:
            return await self._store.finish(operation, Outcome.CANCELLED)

    async def _bring_up(self, operation: Operation, lease: Lease) -> Settled:
        failure = failure_of(operation.error_code, operation.error_message)
        if operation.step in (Step.QUEUED, Step.STOPPING) and await self._is_failed(operation):
            # Its instance may run and answer no more: only a new start can help.
            lease.check()
            await self._store.set_step(operation, Step.STOPPING)
            await self._end(operation, lease)
            reached("restart.ended")
        if failure is None:
            failure = await self._boot.bring_up(operation, lease)
        if failure is None:
            return await self._store.finish(operation, Outcome.SUCCEEDED)
        # Written first: whoever takes over from here goes on undoing.
        await self._store.set_step(operation, Step.UNDOING, failure)
        reached("boot.undoing")
        lease.check()
        if operation.kind is OperationKind.PROVISION:
            await self._backend.remove(operation.engine_id, volume=True)
        else:
            await self._end(operation, lease)
        reached("boot.undone")
        return await self._store.finish(operation, Outcome.FAILED, failure)

    async def _is_failed(self, operation: Operation) -> bool:
        """Whether the engine that is to be started is one that failed."""
        if operation.kind is not OperationKind.START or operation.actor == SYSTEM:
            return operation.kind is OperationKind.RESTART
        # Callers can't start one that runs, unless it failed.
        instance = await self._backend.inspect(operation.engine_id)
        return instance is not None and instance.state is InstanceState.RUNNING

    async def _stop(self, operation: Operation, lease: Lease) -> Settled:
        lease.check()
        await self._store.set_step(operation, Step.STOPPING)
        reached("stop.begun")
        await self._end(operation, lease)
        reached("stop.ended")
        return await self._store.finish(operation, Outcome.SUCCEEDED)

    async def _destroy(self, operation: Operation, lease: Lease) -> Settled:
        lease.check()
        await self._store.set_step(operation, Step.REMOVING)
        reached("destroy.begun")
        await self._backend.remove(operation.engine_id, volume=True)
        reached("destroy.removed")
        return await self._store.finish(operation, Outcome.SUCCEEDED)

    async def _let_go(self, operation: Operation, lease: Lease) -> Settled:
        """Ends the backup of one that died while it copied: it may have left the engine frozen."""
        engine = await self._store.engine(operation.engine_id)
        lease.check()
        if engine.status in (EngineStatus.RUNNING, EngineStatus.FAILED):
            await self._backend.thaw(operation.engine_id)
        return await self._store.finish(operation, Outcome.CANCELLED)

    async def _end(self, operation: Operation, lease: Lease) -> None:
        """Ends the instance; it is removed if it is there all the same, and its volume is kept.

        A container whose processes died unseen is called running for ever, and can't be stopped.
        """
        with suppress(BackendError):
            await self._backend.stop(operation.engine_id, grace_s=STOP_GRACE_S)
        reached("stop.signalled")
        instance = await self._backend.inspect(operation.engine_id)
        if instance is not None and instance.state in (InstanceState.RUNNING, InstanceState.FROZEN):
            lease.check()
            await self._backend.remove(operation.engine_id, volume=False)
