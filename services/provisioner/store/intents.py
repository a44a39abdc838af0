"""Intents: what is to be done to an engine, decided and written down in one transaction.

Locks are taken in the order idempotency key, product, engine, operation.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from services.provisioner.domain.engine import DenialReason, Engine, EngineStatus, Sighting
from services.provisioner.domain.intent import Newborn, Pending
from services.provisioner.domain.operation import SYSTEM, OpenOperation, OperationKind, Outcome
from services.provisioner.domain.policy import check_image
from services.provisioner.domain.transitions import BOOTS, TRANSITIONS, YIELDS, check_begin
from services.provisioner.store.idempotency import once
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.rows import load_sql, to_engine, to_open_operation, to_product, to_status
from services.shared.errors import (
    EngineAlreadyExists,
    EngineNotFound,
    PortExhaustion,
    ProductNotFound,
    QuotaExceeded,
    Unavailable,
)
from services.shared.postgres import Connection, Connections
from services.shared.tracing import REQUEST_ID, TRACEPARENT, onward

_ENGINES = load_sql("engines")
_OPERATIONS = load_sql("operations")
_PRODUCTS = load_sql("products")

# Longer than hundreds take, and not as long as the registry might make each of them wait.
_TURN_S = 10.0


class IntentStore:
    """Writes intents.

    Args:
        database: the registry.
        node: where new engines are made.
        platform_image: what engines run unless asked otherwise; a policy without a list allows its repository.
        ports: gives new engines their ports.
        url_of: URL of an engine by its id and port.
        check_disk: raises Unavailable if there is no room for the data of a new one.
    """

    def __init__(
        self,
        database: Connections,
        *,
        node: str,
        platform_image: str,
        ports: PortAllocator,
        url_of: Callable[[UUID, int], str],
        check_disk: Callable[[], None],
    ) -> None:
        self._database = database
        self._node = node
        self._platform_image = platform_image
        self._ports = ports
        self._url_of = url_of
        self._check_disk = check_disk
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, product_id: UUID) -> AsyncIterator[None]:
        """To be held around a transaction that takes the product's lock.

        Whoever waits for that lock in the registry holds a connection meanwhile: one product's burst
        would take them all, and everybody else would wait with it.

        Raises:
            Unavailable: it did not come in time.
        """
        turn = self._turns.setdefault(product_id, asyncio.Lock())
        try:
            async with asyncio.timeout(_TURN_S):
                await turn.acquire()
        except TimeoutError as error:
            raise Unavailable("the product has too many new users at once") from error
        try:
            yield
        finally:
            turn.release()

    async def engine_of_user(self, product_id: UUID, user_id: str) -> Engine | None:
        async with self._database.connection() as connection:
            return await _engine_of_user(connection, product_id, user_id)

    async def sighting(self, engine_id: UUID) -> Sighting | None:
        """How the engine is at this moment; None once it is gone."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_OPERATIONS["sighting"], {"engine_id": engine_id})
            row = await cursor.fetchone()
        return None if row is None else Sighting(to_status(row["status"]), row["kind"] or "", row["step"] or "")

    async def provision(self, product_id: UUID, user_id: str, newborn: Newborn, actor: str) -> Pending:
        """Writes the engine's row, port and operation, under the product's lock.

        The lock makes the count exact: nobody else adds an engine to the product meanwhile.

        Raises:
            InvalidRequest, PolicyDenied: the product may not run the image.
            EngineAlreadyExists: the user has one, in whatever state.
            QuotaExceeded: the product is at its `max_engines`.
            PortExhaustion: no port of the node is free.
        """
        async with self.turn(product_id), self._database.transaction() as tx:
            return await once(tx, lambda: self._provision(tx, product_id, user_id, newborn, actor))

    async def ensure(
        self, product_id: UUID, user_id: str, newborn: Newborn | None, actor: str, *, auto_wake: bool
    ) -> Engine | DenialReason | Pending:
        """The user's running engine, why there is none, or what to wait for before asking again.

        Args:
            newborn: what to make if the user has no engine; None to make nothing.

        Raises:
            PolicyDenied, QuotaExceeded, PortExhaustion: as for `provision`.
        """
        while True:
            async with self._database.transaction() as tx:
                engine = await _lock_engine_of_user(tx, product_id, user_id)
                if engine is not None:
                    return await self._ensure(tx, engine, actor, may_provision=newborn is not None, wake=auto_wake)
            if newborn is None:
                return DenialReason.ENGINE_NOT_FOUND
            # Another call may be first while this one waits for its turn.
            with suppress(EngineAlreadyExists):
                return await self.provision(product_id, user_id, newborn, actor)

    async def _ensure(
        self, tx: Connection, engine: Engine, actor: str, *, may_provision: bool, wake: bool
    ) -> Engine | DenialReason | Pending:
        """The same for an engine that is there, read under its lock."""
        engine_id = engine.engine_id
        operation = await _open_operation(tx, engine_id)
        if engine.status is EngineStatus.DESTROYING:
            if operation is None or not may_provision:
                return DenialReason.ENGINE_NOT_FOUND
            return Pending(operation.operation_id, engine_id, joined=False)
        if operation is not None and (operation.kind in BOOTS or engine.status is EngineStatus.PROVISIONING):
            return Pending(operation.operation_id, engine_id)
        match engine.status:
            case EngineStatus.RUNNING:
                # Under the engine's lock: a sleep that is decided from now on knows of it.
                await tx.execute(_ENGINES["note_admit"], {"engine_id": engine_id})
                return engine
            case EngineStatus.SLEEPING if wake and operation is None:
                return await self._begin(tx, engine, OperationKind.WAKE, actor)
            case EngineStatus.SLEEPING if wake and operation is not None:
                await self._ask_to_yield(tx, operation, actor)
                return Pending(operation.operation_id, engine_id, joined=False)
            case EngineStatus.SLEEPING | EngineStatus.STOPPED:
                return DenialReason.ENGINE_SLEEPING
            case _:
                return DenialReason.ENGINE_UNHEALTHY

    async def change(self, product_id: UUID, user_id: str, kind: OperationKind, actor: str) -> Pending:
        """Writes an operation on the user's engine, or finds the one to wait for first.

        An operation of the same kind, or another boot if a boot is asked for, is joined. Any other
        has to end first; one that only puts the engine to sleep is asked to give way.

        Raises:
            EngineNotFound, EngineAlreadyRunning, EngineNotRunning: not from the engine's status.
        """
        async with self._database.transaction() as tx:
            return await once(tx, lambda: self._change(tx, product_id, user_id, kind, actor))

    async def _change(self, tx: Connection, product_id: UUID, user_id: str, kind: OperationKind, actor: str) -> Pending:
        engine = await _lock_engine_of_user(tx, product_id, user_id)
        if engine is None or engine.status is EngineStatus.DESTROYING:
            raise EngineNotFound
        operation = await _open_operation(tx, engine.engine_id, lock=True)
        if operation is not None:
            if operation.kind is kind or (operation.kind in BOOTS and kind in BOOTS):
                return Pending(operation.operation_id, engine.engine_id)
            await self._ask_to_yield(tx, operation, actor)
            return Pending(operation.operation_id, engine.engine_id, joined=False)
        check_begin(kind, engine.status)
        return await self._begin(tx, engine, kind, actor)

    async def begin(
        self, engine_id: UUID, kind: OperationKind, expected: EngineStatus, *, reason: str | None = None
    ) -> Pending | None:
        """Writes an operation of the platform's own.

        Args:
            expected: the status that the decision rests on.
            reason: for the history, why.

        Returns None if the engine is gone or in another status by now, or another operation is
        open: then that one decides.
        """
        async with self._database.transaction() as tx:
            engine = await _lock_engine(tx, engine_id)
            if engine is None or engine.status is not expected or await _open_operation(tx, engine_id) is not None:
                return None
            return await self._begin(tx, engine, kind, SYSTEM, reason)

    async def destroy(self, product_id: UUID, user_id: str, actor: str, *, only: UUID | None = None) -> Pending:
        """Marks the engine as being destroyed and writes the operation, whatever its state.

        An operation under way on the engine is asked to give way, and is what to wait for; its
        end begins the destroy.

        Args:
            only: the engine that is meant, if the user may have got another one meanwhile.

        Raises:
            EngineNotFound: the user has no engine, or another than the one meant.
        """
        async with self._database.transaction() as tx:
            if only is not None:
                return await self._destroy(tx, product_id, user_id, actor, only)
            # What gave way to the destroy ends cancelled, and the destroy goes on.
            return await once(tx, lambda: self._destroy(tx, product_id, user_id, actor), again=False)

    async def _destroy(
        self, tx: Connection, product_id: UUID, user_id: str, actor: str, only: UUID | None = None
    ) -> Pending:
        engine = await _lock_engine_of_user(tx, product_id, user_id)
        if engine is None or only not in (None, engine.engine_id):
            raise EngineNotFound
        return await self.begin_destroy(tx, engine, actor)

    async def begin_destroy(self, tx: Connection, engine: Engine, actor: str) -> Pending:
        """As `destroy`, of an engine whose row the transaction has locked."""
        engine_id = engine.engine_id
        operation = await _open_operation(tx, engine_id, lock=True)
        if operation is not None and operation.kind is OperationKind.DESTROY:
            return Pending(operation.operation_id, engine_id)
        if operation is not None and not operation.unowned:
            await _set_status(tx, engine_id, EngineStatus.DESTROYING)
            await _request_cancel(tx, operation.operation_id, actor)
            return Pending(operation.operation_id, engine_id)
        if operation is not None:
            await finish_operation(tx, operation.operation_id, Outcome.CANCELLED)
        return await self._begin(tx, engine, OperationKind.DESTROY, actor)

    async def _ask_to_yield(self, tx: Connection, operation: OpenOperation, actor: str) -> None:
        if operation.kind in YIELDS:
            await _request_cancel(tx, operation.operation_id, actor)

    async def _begin(
        self, tx: Connection, engine: Engine, kind: OperationKind, actor: str, reason: str | None = None
    ) -> Pending:
        """Writes an operation and the status that its kind has while it is under way."""
        during = TRANSITIONS[kind].during
        if engine.status is not during:
            await _set_status(tx, engine.engine_id, during, reason)
        return Pending(await insert_operation(tx, engine.engine_id, kind, actor, reason), engine.engine_id)

    async def _provision(self, tx: Connection, product_id: UUID, user_id: str, newborn: Newborn, actor: str) -> Pending:
        await self.check_room(tx, product_id, user_id, newborn.image)
        return await self.add(tx, newborn, actor, product_id=product_id, user_id=user_id)

    async def check_room(self, tx: Connection, product_id: UUID, user_id: str, image: str) -> None:
        """Locks the product, so that until the transaction's end nobody else adds an engine to it.

        Raises:
            InvalidRequest, PolicyDenied, EngineAlreadyExists, QuotaExceeded: it may not have one more,
            of this image, for this user.
        """
        values = {"product_id": product_id, "user_id": user_id}
        cursor = await tx.execute(_PRODUCTS["lock_product"], values)
        row = await cursor.fetchone()
        if row is None:
            raise ProductNotFound
        policy = to_product(row).policy
        check_image(image, policy, self._platform_image)
        # A statement of its own: it sees what was added while the lock was waited for.
        cursor = await tx.execute(_PRODUCTS["room"], values)
        room = await cursor.fetchone()
        assert room is not None, "an aggregate has a row"
        if room["exists"]:
            raise EngineAlreadyExists("user_id: the user has an engine already")
        if room["engines"] >= policy.max_engines:
            raise QuotaExceeded(f"the product has {room['engines']} of at most {policy.max_engines} engines")

    async def add(
        self,
        tx: Connection,
        newborn: Newborn,
        actor: str,
        *,
        product_id: UUID | None = None,
        user_id: str | None = None,
    ) -> Pending:
        """Writes the row, the port and the operation of an engine; without an owner it is one of the warm pool.

        Raises:
            PortExhaustion: no port of the node is free.
            Unavailable: there is no room for its data.
        """
        self._check_disk()
        values: dict[str, Any] = {
            "engine_id": newborn.engine_id,
            "product_id": product_id,
            "user_id": user_id,
            "image": newborn.image,
            "node": self._node,
            "encrypted_key": newborn.encrypted_key,
        }
        await tx.execute(_ENGINES["insert_engine"], values)
        port = await self._ports.lease(tx, newborn.engine_id)
        if port is None:
            raise PortExhaustion("no port is free for one more engine")
        url = self._url_of(newborn.engine_id, port)
        await tx.execute(_ENGINES["set_url"], {"engine_id": newborn.engine_id, "url": url})
        # It is `provisioning` from the start.
        operation_id = await insert_operation(tx, newborn.engine_id, OperationKind.PROVISION, actor)
        return Pending(operation_id, newborn.engine_id)


async def insert_operation(
    tx: Connection, engine_id: UUID, kind: OperationKind, actor: str, reason: str | None = None
) -> UUID:
    """Writes an operation with its audit event and wakes the workers at commit; returns its id."""
    operation_id, origin = uuid4(), dict(onward())
    values = {
        "operation_id": operation_id,
        "engine_id": engine_id,
        "kind": kind,
        "actor": actor,
        "detail": reason,
        "request_id": origin.get(REQUEST_ID),
        "traceparent": origin.get(TRACEPARENT),
    }
    await tx.execute(_OPERATIONS["insert_operation"], values)
    return operation_id


async def finish_operation(
    tx: Connection,
    operation_id: UUID,
    outcome: Outcome,
    error_code: str | None = None,
    error_message: str | None = None,
) -> dict[str, Any]:
    """Ends an operation with its audit event and wakes those who wait for it; returns its row."""
    cursor = await tx.execute(
        _OPERATIONS["finish_operation"],
        {
            "operation_id": operation_id,
            "outcome": outcome,
            "error_code": error_code,
            "error_message": error_message,
        },
    )
    row = await cursor.fetchone()
    assert row is not None
    return row


async def _engine_of_user(tx: Connection, product_id: UUID, user_id: str) -> Engine | None:
    cursor = await tx.execute(_ENGINES["engine_of_user"], {"product_id": product_id, "user_id": user_id})
    row = await cursor.fetchone()
    return None if row is None else to_engine(row)


async def _lock_engine_of_user(tx: Connection, product_id: UUID, user_id: str) -> Engine | None:
    cursor = await tx.execute(_ENGINES["lock_engine_of_user"], {"product_id": product_id, "user_id": user_id})
    row = await cursor.fetchone()
    return None if row is None else to_engine(row)


async def _lock_engine(tx: Connection, engine_id: UUID) -> Engine | None:
    cursor = await tx.execute(_ENGINES["lock_engine"], {"engine_id": engine_id})
    row = await cursor.fetchone()
    return None if row is None else to_engine(row)


async def _set_status(tx: Connection, engine_id: UUID, status: EngineStatus, reason: str | None = None) -> None:
    await tx.execute(_ENGINES["set_status"], {"engine_id": engine_id, "status": status, "reason": reason})


async def _request_cancel(tx: Connection, operation_id: UUID, actor: str) -> None:
    await tx.execute(_OPERATIONS["request_cancel"], {"operation_id": operation_id, "actor": actor})


async def _open_operation(tx: Connection, engine_id: UUID, *, lock: bool = False) -> OpenOperation | None:
    cursor = await tx.execute(
        _OPERATIONS["lock_open_operation" if lock else "open_operation"], {"engine_id": engine_id}
    )
    row = await cursor.fetchone()
    return None if row is None else to_open_operation(row)
