"""The use cases of engines: each writes an intent, and waits for what workers make of it.

A caller who goes away changes nothing: the intent is written or not, and is carried out if it is.
"""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from uuid import UUID

from services.provisioner.domain.engine import DenialReason, Engine
from services.provisioner.domain.intent import Newborn, Pending
from services.provisioner.domain.operation import OperationKind, Outcome, Settled
from services.provisioner.domain.product import Product
from services.provisioner.domain.transitions import BOOTS
from services.provisioner.execution import STOP_GRACE_S
from services.shared.errors import BootTimeout, EngineAlreadyExists, EngineNotFound, ServiceError, Unavailable
from services.shared.failpoints import reached
from services.shared.keys import EngineKeyring
from services.shared.user_id import check_user_id

_T = TypeVar("_T")

# After its timeout a failed boot is undone, and its own error is better than ours.
_UNDO_S = 15.0
_DESTROY_S = 60.0
_MAKE_RUN = BOOTS | {OperationKind.ROTATE_KEY}


class Intents(Protocol):
    """Writes what is to be done; see the store for the transactions."""

    async def engine_of_user(self, product_id: UUID, user_id: str) -> Engine | None: ...
    async def provision(self, product_id: UUID, user_id: str, newborn: Newborn, actor: str) -> Pending: ...
    async def ensure(
        self, product_id: UUID, user_id: str, newborn: Newborn | None, actor: str, *, auto_wake: bool
    ) -> Engine | DenialReason | Pending: ...
    async def change(self, product_id: UUID, user_id: str, kind: OperationKind, actor: str) -> Pending: ...
    async def destroy(self, product_id: UUID, user_id: str, actor: str, *, only: UUID | None = None) -> Pending: ...


class Pool(Protocol):
    async def claim(self, image: str, product_id: UUID, user_id: str, actor: str) -> Engine | None: ...


class Watch(Protocol):
    async def wait(self, operation_id: UUID, timeout_s: float) -> Settled: ...


class Lifecycle:
    """Args:
    intents: writes what is to be done.
    pool: has engines that were booted ahead.
    watch: tells when it is done.
    keyring: encrypts the keys of new engines.
    image: what engines run unless asked otherwise.
    boot_timeout_s: how long a boot may take, in seconds.
    """

    def __init__(
        self, intents: Intents, pool: Pool, watch: Watch, keyring: EngineKeyring, *, image: str, boot_timeout_s: float
    ) -> None:
        self._intents = intents
        self._pool = pool
        self._watch = watch
        self._keyring = keyring
        self._image = image
        self._boot_timeout_s = boot_timeout_s
        self._writing: set[asyncio.Task[Any]] = set()

    async def provision(self, product: Product, user_id: str, image: str) -> Engine:
        """Gives the user an engine of the warm pool, or makes one and waits until it is healthy.

        Args:
            image: what it runs; empty for the platform's own.

        Raises:
            InvalidRequest, PolicyDenied, EngineAlreadyExists, QuotaExceeded, PortExhaustion,
            BackendError, BootTimeout, Unavailable; EngineNotFound: it was destroyed right afterwards.
        """
        check_user_id(user_id)
        image = image or self._image
        claimed = await self._claimed(product, user_id, image)
        if claimed is not None:
            return claimed
        newborn = Newborn.of(image, self._keyring)
        pending = await self._written(self._intents.provision(product.product_id, user_id, newborn, _actor(product)))
        outcome = await self._ended(pending, self._boot_deadline())
        engine = await self._intents.engine_of_user(product.product_id, user_id)
        if outcome is not Outcome.SUCCEEDED:
            raise Unavailable("user_id: the engine was destroyed while it booted")
        if engine is None or engine.engine_id != pending.engine_id:
            raise EngineNotFound
        return engine

    async def ensure(
        self, product: Product, user_id: str, *, auto_provision: bool, auto_wake: bool
    ) -> Engine | DenialReason:
        """The user's running engine, from the warm pool, made or woken if allowed, or why there is none.

        Joins whatever boot of the engine is under way, whoever began it.

        Raises:
            InvalidRequest, PolicyDenied, QuotaExceeded, PortExhaustion, BackendError, BootTimeout, Unavailable.
        """
        check_user_id(user_id)
        newborn = Newborn.of(self._image, self._keyring) if auto_provision else None
        deadline = self._boot_deadline()
        while True:
            if newborn is not None:
                # Another call may be first: then it made what this one finds next.
                with suppress(EngineAlreadyExists):
                    claimed = await self._claimed(product, user_id, newborn.image)
                    if claimed is not None:
                        return claimed
            answer = await self._written(
                self._intents.ensure(product.product_id, user_id, newborn, _actor(product), auto_wake=auto_wake)
            )
            if not isinstance(answer, Pending):
                return answer
            await self._ended(answer, deadline)

    async def start(self, product: Product, user_id: str) -> Engine:
        """Starts the user's stopped, sleeping or failed engine and waits until it is healthy.

        Raises:
            InvalidRequest, EngineNotFound, EngineAlreadyRunning, BackendError, PortExhaustion,
            BootTimeout, Unavailable.
        """
        return await self._changed(product, user_id, OperationKind.START)

    async def wake(self, product: Product, user_id: str) -> Engine:
        """Wakes the user's sleeping engine and waits until it is healthy.

        Raises:
            InvalidRequest, EngineNotFound, EngineAlreadyRunning, EngineNotRunning, BackendError,
            PortExhaustion, BootTimeout, Unavailable.
        """
        return await self._changed(product, user_id, OperationKind.WAKE)

    async def stop(self, product: Product, user_id: str) -> Engine:
        """Stops the user's engine; its data is kept.

        Raises:
            InvalidRequest, EngineNotFound, EngineNotRunning, Unavailable.
        """
        return await self._changed(product, user_id, OperationKind.STOP)

    async def sleep(self, product: Product, user_id: str) -> Engine:
        """Freezes the user's running engine.

        Raises:
            InvalidRequest, EngineNotFound, EngineNotRunning; Unavailable: it is at work.
        """
        return await self._changed(product, user_id, OperationKind.SLEEP)

    async def rotate_key(self, product: Product, user_id: str) -> Engine:
        """Gives the user's running engine a new key; returns the engine with it.

        Raises:
            InvalidRequest, EngineNotFound, EngineNotRunning, BackendError, BootTimeout, Unavailable.
        """
        return await self._changed(product, user_id, OperationKind.ROTATE_KEY)

    async def _changed(self, product: Product, user_id: str, kind: OperationKind) -> Engine:
        check_user_id(user_id)
        deadline = self._boot_deadline() + STOP_GRACE_S
        while True:
            pending = await self._written(self._intents.change(product.product_id, user_id, kind, _actor(product)))
            outcome = await self._ended(pending, deadline, BootTimeout if kind in _MAKE_RUN else Unavailable)
            if pending.joined and outcome is Outcome.SUCCEEDED:
                break
            if pending.joined and kind is OperationKind.SLEEP:
                raise Unavailable("user_id: the engine stays awake: it is wanted", retry_after_s=2)
            # Something stood in the way, or this gave way to something else: ask again.
        engine = await self._intents.engine_of_user(product.product_id, user_id)
        if engine is None or engine.engine_id != pending.engine_id:
            raise EngineNotFound
        return engine

    async def destroy(self, product: Product, user_id: str) -> UUID:
        """Removes the user's engine with its data, whatever its state; returns its id.

        Raises:
            InvalidRequest, EngineNotFound, Unavailable: it is still being removed.
        """
        check_user_id(user_id)
        deadline = time.monotonic() + _DESTROY_S
        pending = await self._written(self._intents.destroy(product.product_id, user_id, _actor(product)))
        try:
            while True:
                await self._watch.wait(pending.operation_id, deadline - time.monotonic())
                # What ended may have been an operation that gave way; the destroy follows it.
                pending = await self._written(
                    self._intents.destroy(product.product_id, user_id, _actor(product), only=pending.engine_id)
                )
        except EngineNotFound:
            return pending.engine_id
        except TimeoutError as error:
            raise Unavailable("user_id: the engine is still being removed", retry_after_s=5) from error

    async def _claimed(self, product: Product, user_id: str, image: str) -> Engine | None:
        return await self._written(self._pool.claim(image, product.product_id, user_id, _actor(product)))

    def _boot_deadline(self) -> float:
        return time.monotonic() + self._boot_timeout_s + _UNDO_S

    async def _ended(self, pending: Pending, deadline: float, late: type[ServiceError] = BootTimeout) -> Outcome | None:
        """Waits for the operation's end; raises what it failed with, if that is the caller's answer, or `late`."""
        try:
            settled = await self._watch.wait(pending.operation_id, deadline - time.monotonic())
        except TimeoutError as error:
            raise late("the operation on the engine is still under way; call again to join it") from error
        failure = settled.failure()
        if failure is not None and (pending.joined or settled.outcome is None):
            raise failure
        return settled.outcome

    async def _written(self, intent: Coroutine[Any, Any, _T]) -> _T:
        """Runs the intent to its end even if the caller goes away meanwhile."""
        task = asyncio.create_task(intent)
        self._writing.add(task)
        task.add_done_callback(self._forget)
        written = await asyncio.shield(task)
        reached("intent.written")
        return written

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._writing.discard(task)
        if not task.cancelled():
            # Whoever would have been told may be gone.
            task.exception()


def _actor(product: Product) -> str:
    return f"product:{product.slug}"
