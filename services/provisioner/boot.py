"""Bringing an engine up: create, start, probe until it is healthy."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import count
from uuid import UUID

import structlog

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState, PortTaken
from services.provisioner.domain.engine import Engine
from services.provisioner.domain.operation import PATIENCE_S, GiveWay, LeaseLost, Operation, OperationKind, Step
from services.provisioner.lease import Lease
from services.provisioner.ports import Backend, EngineClient, OperationLog
from services.shared.errors import BackendError, BootTimeout, Internal, PortExhaustion, ServiceError, Unavailable
from services.shared.failpoints import reached
from services.shared.keys import EngineKeyring
from services.shared.tracing import span

log = structlog.get_logger(__name__)

# A boot taken over after its deadline gets one honest look at the engine before it is undone.
_LAST_LOOK_S = 2.0
# What was frozen answers at once, or has to be looked at as any other.
_THAWED_S = 1.0
_FIRST_PAUSE_S = 0.002
_GROWTH = 1.2
_LONGEST_PAUSE_S = 0.5
# Probes are counted for those who watch, and ended engines noticed, once probes come so seldom.
_SELDOM_S = 0.05


class Boot:
    """Args:
    store: where steps are written.
    backend: runs the engines.
    engines: asks engines for their health.
    keyring: reads engine keys, whose hash each engine is told.
    passthrough: environment that every engine gets besides.
    boot_timeout_s: named in the error of a boot that took longer.
    delayed: told of boots that wait for what can't be reached, and why.
    """

    def __init__(
        self,
        store: OperationLog,
        backend: Backend,
        engines: EngineClient,
        keyring: EngineKeyring,
        *,
        passthrough: Mapping[str, str],
        boot_timeout_s: float,
        delayed: Callable[[UUID, Unavailable], None],
    ) -> None:
        self._store = store
        self._backend = backend
        self._engines = engines
        self._keyring = keyring
        self._passthrough = passthrough
        self._boot_timeout_s = boot_timeout_s
        self._delayed = delayed

    async def bring_up(self, operation: Operation, lease: Lease) -> ServiceError | None:
        """Makes the engine run; returns why it can't be.

        Raises:
            LeaseLost, GiveWay.
        """
        deadline = time.monotonic() + max(operation.seconds_left, _LAST_LOOK_S)
        if operation.kind is OperationKind.WAKE and await self._woken(operation, lease):
            return None
        pause = _FIRST_PAUSE_S
        ended_before = False
        in_vain_since: float | None = None
        while True:
            begun = time.monotonic()
            try:
                await self._attempt(operation, lease, deadline)
            except PortTaken:
                log.info("port_taken", engine_id=str(operation.engine_id))
            except _Ended:
                # A port that was lost in a race looks like this, and a second start will tell.
                if ended_before:
                    return BackendError("the engine ended while it booted")
                ended_before = True
            except Unavailable as error:
                now = time.monotonic()
                if now + pause > deadline:
                    return error
                if in_vain_since is None or now > begun + PATIENCE_S:
                    # One that took so long had got somewhere, or was the first to find that nothing answers.
                    in_vain_since = now
                if now > in_vain_since + PATIENCE_S:
                    self._delayed(operation.operation_id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            except ServiceError as error:
                return error
            except (LeaseLost, GiveWay):
                raise
            except Exception:
                log.exception("boot_failed", engine_id=str(operation.engine_id))
                return Internal(f"the engine could not be booted; operation id {operation.operation_id}")
            else:
                return None

    async def _woken(self, operation: Operation, lease: Lease) -> bool:
        """Thaws the engine; whether that was all that it took.

        It is asked for its health while it is frozen still, and answers as soon as it can.
        """
        engine = await self._store.engine(operation.engine_id)
        lease.check()
        answer = asyncio.create_task(self._engines.health(engine.url))
        try:
            # It has had its port all the time: nothing else can answer there.
            if not _runs(await self._backend.thaw(engine.engine_id)):
                return False
            reached("boot.thawed")
            async with asyncio.timeout(_THAWED_S):
                return (await answer).healthy
        except (ServiceError, TimeoutError):
            return False
        finally:
            answer.cancel()

    async def _attempt(self, operation: Operation, lease: Lease, deadline: float) -> None:
        engine = await self._store.engine(operation.engine_id)
        if engine.port is None:
            # When it lost its own there was no other.
            if not await self._store.swap_port(operation, engine):
                raise PortExhaustion("no port is free for one more engine")
            raise PortTaken
        spec = self._spec(engine, engine.port)
        # A new engine has but one generation: `create` and `start` find what is there by themselves.
        new = operation.kind is OperationKind.PROVISION
        instance = None if new else await self._backend.inspect(engine.engine_id)
        lease.check()
        alive = instance is not None and instance.state in (InstanceState.FROZEN, InstanceState.RUNNING)
        if instance is not None and alive and operation.kind is not OperationKind.ROTATE_KEY:
            # Thawed, or taken, as it is: one of an older generation has the user's work in its memory.
            spec = replace(spec, generation=instance.generation)
        else:
            await self._store.set_step(operation, Step.CREATING)
            reached("boot.creating")
            await self._backend.create(spec)
            reached("boot.created")
            lease.check()
        await self._store.set_step(operation, Step.STARTING)
        reached("boot.starting")
        try:
            image_id = await self._backend.start(spec)
        except PortTaken:
            lease.check()
            if not await self._store.swap_port(operation, engine):
                raise PortExhaustion("no port is free for one more engine") from None
            reached("boot.port_swapped")
            raise
        reached("boot.started")
        lease.check()
        if image_id != engine.image_id:
            # What runs is what the row says from here on, whatever the image's name will stand for.
            await self._store.pin_image(operation, image_id)
        await self._store.set_step(operation, Step.PROBING)
        reached("boot.probing")
        with span("probe until healthy"):
            await self._probe(operation, engine, lease, deadline)
        reached("boot.healthy")

    async def _probe(self, operation: Operation, engine: Engine, lease: Lease, deadline: float) -> None:
        """Returns once the engine is healthy; the first look is at once."""
        pause = _FIRST_PAUSE_S
        for probes in count(1):
            asked = time.monotonic()
            health = await self._engines.health(engine.url)
            # Also if it took as long: whoever has taken the port may never answer.
            seldom = max(pause, time.monotonic() - asked) >= _SELDOM_S
            # The backend's word as well: something else might answer on the engine's port.
            if (health.healthy or seldom) and not _runs(await self._backend.inspect(engine.engine_id)):
                raise _Ended
            if health.healthy:
                return
            lease.check()
            if seldom:
                await self._store.set_probes(operation, probes)
            if time.monotonic() + pause > deadline:
                raise BootTimeout(f"the engine was not healthy within {self._boot_timeout_s:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * _GROWTH, _LONGEST_PAUSE_S)

    def _spec(self, engine: Engine, port: int) -> EngineSpec:
        key = self._keyring.decrypt(engine.engine_id, engine.encrypted_key)
        return EngineSpec(
            engine_id=engine.engine_id,
            generation=engine.generation,
            image=engine.image_id or engine.image,
            port=port,
            environment={**self._passthrough, "ENGINE_KEY_HASH": sha256(key.encode()).hexdigest()},
        )


def _runs(instance: Instance | None) -> bool:
    return instance is not None and instance.state is InstanceState.RUNNING


class _Ended(Exception):
    """The instance is not running any more."""
