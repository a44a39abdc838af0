"""Putting an engine to sleep without taking it from under anybody.

The status `sleeping` in the row is the announcement: whoever asks from then on is told that the
engine sleeps. Those who were admitted before are waited for: once every Admission has flushed all
that it admitted before the announcement, a second look shows whether anybody was let in, or the
engine is at work. If so the announcement is taken back; else the engine is frozen.
"""

import asyncio
import time

from services.provisioner.backends.base import InstanceState, Usage
from services.provisioner.domain.engine import Engine
from services.provisioner.domain.operation import GiveWay, Operation, Outcome, Settled, Step
from services.provisioner.lease import Lease
from services.provisioner.ports import Backend, EngineClient, OperationLog
from services.shared.errors import BackendError, Unavailable
from services.shared.failpoints import reached

# Counters of an engine that only answers its health probes move about this much.
_CPU_NOISE_S = 0.1
_NETWORK_NOISE_BYTES = 64 * 1024
_POLL_S = 0.1
_FLUSH_DEADLINE_S = 10.0
_BUSY_RETRY_S = 2.0


def work_between(before: Usage, after: Usage) -> str | None:
    """The sign of work that an engine's counters give, if any."""
    if after.cpu_s - before.cpu_s > _CPU_NOISE_S:
        return "it uses its processor"
    if after.network_bytes - before.network_bytes > _NETWORK_NOISE_BYTES:
        return "it uses its network"
    return None


class FallAsleep:
    def __init__(self, store: OperationLog, backend: Backend, engines: EngineClient) -> None:
        self._store = store
        self._backend = backend
        self._engines = engines

    async def execute(self, operation: Operation, lease: Lease) -> Settled:
        """Freezes the engine, or leaves it running and says why.

        Raises:
            LeaseLost; Unavailable: to be tried again.
        """
        engine = await self._store.engine(operation.engine_id)
        try:
            busy = await self._freeze(operation, engine, lease)
        except GiveWay:
            await self._thaw(engine)
            raise
        except BackendError as error:
            busy = error.message
        if busy is None:
            return await self._store.finish(operation, Outcome.SUCCEEDED)
        await self._thaw(engine)
        failure = Unavailable(f"the engine stays awake: {busy}", retry_after_s=_BUSY_RETRY_S)
        return await self._store.finish(operation, Outcome.FAILED, failure)

    async def _freeze(self, operation: Operation, engine: Engine, lease: Lease) -> str | None:
        """Freezes the engine, unless there is a reason not to, which is returned."""
        lease.check()
        if operation.step is Step.FREEZING and await self._is_frozen(engine):
            # The looks came before that step; a frozen engine could not answer another.
            return await self._store.wanted(operation)
        await self._store.set_step(operation, Step.ANNOUNCED)
        reached("sleep.announced")
        # Read after the announcement was committed: whoever looks from now on has seen it.
        announced_at = await self._store.clock()
        before = await self._backend.usage(engine.engine_id)
        deadline = time.monotonic() + _FLUSH_DEADLINE_S
        while not await self._store.all_flushed(announced_at):
            lease.check()
            if time.monotonic() > deadline:
                return "an admission replica has not been heard of for some time"
            await asyncio.sleep(_POLL_S)
        health = await self._engines.health(engine.url)
        if not health.healthy:
            return "it does not answer"
        if health.active:
            return "it says that it is at work"
        work = work_between(before, await self._backend.usage(engine.engine_id))
        if work is not None:
            return work
        wanted = await self._store.wanted(operation)
        if wanted is not None:
            return wanted
        lease.check()
        await self._store.set_step(operation, Step.FREEZING)
        reached("sleep.freezing")
        await self._backend.freeze(engine.engine_id)
        reached("sleep.frozen")
        # Not what was asked for is written down, but what has come of it.
        if not await self._is_frozen(engine):
            return "it could not be frozen"
        lease.check()
        return None

    async def _is_frozen(self, engine: Engine) -> bool:
        instance = await self._backend.inspect(engine.engine_id)
        return instance is not None and instance.state is InstanceState.FROZEN

    async def _thaw(self, engine: Engine) -> None:
        await self._backend.thaw(engine.engine_id)
        reached("sleep.thawed")
