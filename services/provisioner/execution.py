"""How an operation is carried out, step by step.

Every step may be repeated: after a crash in the middle of it another process takes the
operation over and does the step again. Between any two effects the lease is checked, so that a
process which has lost it, or whose operation has to give way to a destroy, stops there.
"""

import asyncio
import time
from collections.abc import Mapping
from hashlib import sha256
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, EngineSpec, InstanceState, PortTaken
from services.provisioner.domain.engine import Engine
from services.provisioner.domain.operation import (
    Ending,
    GiveWay,
    LeaseLost,
    Operation,
    OperationKind,
    Settled,
    Step,
    failure_of,
)
from services.shared.errors import BackendError, BootTimeout, Internal, PortExhaustion, ServiceError, Unavailable
from services.shared.keys import EngineKeyring

log = structlog.get_logger(__name__)

# A boot taken over after its deadline gets one honest look at the engine before it is undone.
_LAST_LOOK_S = 2.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5
_STOP_GRACE_S = 10.0


class OperationLog(Protocol):
    """What is known of an operation and its engine, and what is written of it."""

    async def engine(self, engine_id: UUID) -> Engine: ...
    async def set_step(self, operation: Operation, step: Step, failure: ServiceError | None = None) -> None: ...
    async def swap_port(self, operation: Operation, engine: Engine) -> bool: ...
    async def finish(
        self, operation: Operation, ending: Ending, *, error_code: str | None = None, error_message: str | None = None
    ) -> Settled: ...


class Prober(Protocol):
    async def healthy(self, url: str) -> bool:
        """Whether the engine at this URL says that it is well."""
        ...


class Lease:
    """The right to act on an operation, until a moment on this process's monotonic clock."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._give_way = False

    def renew(self, until: float, *, give_way: bool) -> None:
        self._until = until
        self._give_way = give_way

    def revoke(self) -> None:
        """Makes the next check fail: the operation is to be handed over."""
        self._until = 0.0

    def check(self) -> None:
        """To be called before every effect.

        Raises:
            LeaseLost: the lease has run out.
            GiveWay: a destroy waits for this operation's end.
        """
        if time.monotonic() >= self._until:
            raise LeaseLost
        if self._give_way:
            raise GiveWay


class Executor:
    """Carries operations out.

    Args:
        store: where steps and ends are written.
        backend: runs the engines.
        prober: asks engines for their health.
        keyring: reads engine keys, whose hash each engine is told.
        passthrough: environment that every engine gets besides.
        boot_timeout_s: named in the error of a boot that took longer.
    """

    def __init__(
        self,
        store: OperationLog,
        backend: Backend,
        prober: Prober,
        keyring: EngineKeyring,
        *,
        passthrough: Mapping[str, str],
        boot_timeout_s: float,
    ) -> None:
        self._store = store
        self._backend = backend
        self._prober = prober
        self._keyring = keyring
        self._passthrough = passthrough
        self._boot_timeout_s = boot_timeout_s

    async def execute(self, operation: Operation, lease: Lease) -> Settled:
        """Carries the operation out to its end, good or bad.

        Raises:
            LeaseLost: stopped, because another process may be working on it.
            Unavailable: backend or registry can't be reached now; the operation is still open.
        """
        try:
            if operation.kind is OperationKind.DESTROY:
                return await self._destroy(operation, lease)
            return await self._boot(operation, lease)
        except GiveWay:
            return await self._store.finish(operation, Ending.FAILED)

    async def _destroy(self, operation: Operation, lease: Lease) -> Settled:
        lease.check()
        await self._store.set_step(operation, Step.REMOVING)
        await self._backend.remove(operation.engine_id, volume=True)
        return await self._store.finish(operation, Ending.GONE)

    async def _boot(self, operation: Operation, lease: Lease) -> Settled:
        failure = failure_of(operation.error_code, operation.error_message)
        if failure is None:
            failure = await self._bring_up(operation, lease)
        if failure is None:
            return await self._store.finish(operation, Ending.RUNNING)
        # Written first: whoever takes over from here goes on undoing.
        await self._store.set_step(operation, Step.UNDOING, failure)
        lease.check()
        if operation.kind is OperationKind.PROVISION:
            await self._backend.remove(operation.engine_id, volume=True)
            ending = Ending.GONE
        else:
            await self._backend.stop(operation.engine_id, grace_s=_STOP_GRACE_S)
            ending = Ending.FAILED
        return await self._store.finish(operation, ending, error_code=failure.code, error_message=failure.message)

    async def _bring_up(self, operation: Operation, lease: Lease) -> ServiceError | None:
        """Makes the engine run; returns why it can't be."""
        deadline = time.monotonic() + max(operation.seconds_left, _LAST_LOOK_S)
        pause = _FIRST_PAUSE_S
        ended_before = False
        while True:
            try:
                await self._attempt(operation, lease, deadline)
            except PortTaken as taken:
                log.info("port_taken", engine_id=str(operation.engine_id), port=taken.args)
            except _Ended:
                # A port that was lost in a race looks like this, and a second start will tell.
                if ended_before:
                    return BackendError("the engine ended while it booted")
                ended_before = True
            except Unavailable as error:
                if time.monotonic() + pause > deadline:
                    return error
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            except ServiceError as error:
                return error
            except (LeaseLost, GiveWay):
                raise
            except Exception:
                log.exception("boot_failed", engine_id=str(operation.engine_id))
                return Internal("the engine could not be booted")
            else:
                return None

    async def _attempt(self, operation: Operation, lease: Lease, deadline: float) -> None:
        engine = await self._store.engine(operation.engine_id)
        if engine.port is None:
            raise PortExhaustion("no port is free for one more engine")
        spec = self._spec(engine, engine.port)
        lease.check()
        await self._store.set_step(operation, Step.CREATING)
        await self._backend.create(spec)
        lease.check()
        await self._store.set_step(operation, Step.STARTING)
        try:
            await self._backend.start(spec)
        except PortTaken:
            lease.check()
            if not await self._store.swap_port(operation, engine):
                raise PortExhaustion("no port is free for one more engine") from None
            raise
        lease.check()
        await self._store.set_step(operation, Step.PROBING)
        await self._probe(engine, lease, deadline)

    async def _probe(self, engine: Engine, lease: Lease, deadline: float) -> None:
        """Returns once the engine is healthy; the first look is at once."""
        pause = _FIRST_PAUSE_S
        while True:
            healthy = await self._prober.healthy(engine.url)
            instance = await self._backend.inspect(engine.engine_id)
            # The backend's word as well: something else might answer on the engine's port.
            if instance is None or instance.state is not InstanceState.RUNNING:
                raise _Ended
            if healthy:
                return
            lease.check()
            if time.monotonic() + pause > deadline:
                raise BootTimeout(f"the engine was not healthy within {self._boot_timeout_s:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)

    def _spec(self, engine: Engine, port: int) -> EngineSpec:
        key = self._keyring.decrypt(engine.engine_id, engine.encrypted_key)
        key_hash = sha256(key.encode()).hexdigest()
        return EngineSpec(
            engine_id=engine.engine_id,
            generation=engine.generation,
            image=engine.image,
            port=port,
            environment={**self._passthrough, "ENGINE_KEY_HASH": key_hash},
        )


class _Ended(Exception):
    """The instance is not running any more."""
