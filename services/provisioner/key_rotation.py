"""Giving a running engine a new key, without a moment in which no key works.

The new key is written as pending before the engine hears of it, and the engine takes both for a
while. Only when the engine has shown that it takes the new one is it committed. If that can't be
found out, the engine is started anew with the key that is in the row.
"""

import asyncio
import time
from hashlib import sha256

from services.provisioner.boot import Boot
from services.provisioner.domain.operation import Operation, Outcome, Settled, Step
from services.provisioner.lease import Lease
from services.provisioner.ports import Backend, EngineClient, OperationLog
from services.shared.errors import BackendError, ServiceError
from services.shared.failpoints import reached
from services.shared.keys import EngineKeyring, new_engine_key

OVERLAP_S = 60.0
"""Seconds for which an engine takes its old key as well."""

_STOP_GRACE_S = 30.0
_PAUSE_S = 0.2
_PATIENCE_S = 15.0
# What an engine answers that knows nothing of rotation.
_NO_ENDPOINT = frozenset({404, 405, 501})


class KeyRotation:
    def __init__(
        self, store: OperationLog, backend: Backend, boot: Boot, engines: EngineClient, keyring: EngineKeyring
    ) -> None:
        self._store = store
        self._backend = backend
        self._boot = boot
        self._engines = engines
        self._keyring = keyring

    async def execute(self, operation: Operation, lease: Lease) -> Settled:
        """Rotates the key to its end; an engine without the endpoint is made anew on its volume.

        Raises:
            LeaseLost, GiveWay; Unavailable: to be tried again.
        """
        if operation.step in (Step.QUEUED, Step.ROTATING):
            lease.check()
            await self._store.set_step(operation, Step.ROTATING)
            key = self._keyring.encrypt(operation.engine_id, new_engine_key())
            await self._store.set_pending_key(operation, key)
            reached("rotate.pending")
            rotated = await self._rotate(operation, lease)
            if rotated:
                return await self._store.finish(operation, Outcome.SUCCEEDED)
            if rotated is None:
                failure = BackendError("the engine did not take its new key")
                return await self._undo(operation, lease, failure)
            # From here on the new key is the engine's key, and the boot below gives it.
            await self._store.recreate_with_pending_key(operation)
            reached("rotate.recreating")
        lease.check()
        await self._backend.stop(operation.engine_id, grace_s=_STOP_GRACE_S)
        reached("rotate.stopped")
        boot_failure = await self._boot.bring_up(operation, lease)
        if boot_failure is None:
            return await self._store.finish(operation, Outcome.SUCCEEDED)
        return await self._undo(operation, lease, boot_failure)

    async def _rotate(self, operation: Operation, lease: Lease) -> bool | None:
        """Whether the engine has the new key; False if it knows nothing of rotation, None if it does not answer."""
        engine = await self._store.engine(operation.engine_id)
        assert engine.pending_key is not None, "written before"
        old = self._keyring.decrypt(engine.engine_id, engine.encrypted_key)
        new = self._keyring.decrypt(engine.engine_id, engine.pending_key)
        new_hash = sha256(new.encode()).hexdigest()
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            lease.check()
            status = await self._engines.rotate_key(engine.url, old, new_hash, OVERLAP_S)
            if status in _NO_ENDPOINT:
                return False
            reached("rotate.told")
            # Repeated with the new key: it changes nothing, and shows that the new key is taken.
            if await self._engines.rotate_key(engine.url, new, new_hash, OVERLAP_S) == 200:
                reached("rotate.shown")
                return True
            await asyncio.sleep(_PAUSE_S)
        return None

    async def _undo(self, operation: Operation, lease: Lease, failure: ServiceError) -> Settled:
        lease.check()
        await self._backend.stop(operation.engine_id, grace_s=_STOP_GRACE_S)
        reached("rotate.undone")
        return await self._store.finish(operation, Outcome.FAILED, failure)
