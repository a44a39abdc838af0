"""Idempotency keys in the registry.

Invariants: the row of a key is written in the transaction that begins what its call asks for, so
that a repeated call finds what was begun, however the first one ended; and an answer is kept before
it is given, so that none is ever followed by another. Only successes are answers: an error has
begun nothing, or what was begun has been undone, and the call may be made again.

The row is locked before all others.
"""

from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from services.provisioner.domain.idempotency import KeyedCall
from services.provisioner.domain.intent import Pending
from services.provisioner.metrics import REPLAYS
from services.provisioner.store.rows import load_sql
from services.shared.errors import IdempotencyConflict, ServiceError
from services.shared.failpoints import reached
from services.shared.keys import EngineKeyring
from services.shared.postgres import Connection, Connections

_SQL = load_sql("idempotency")
_BATCH = 1000

# The call under way, and the transaction that is all of it.
_call: ContextVar[KeyedCall | None] = ContextVar("call", default=None)
_whole: ContextVar[Connection | None] = ContextVar("whole", default=None)


@asynccontextmanager
async def transaction(database: Connections) -> AsyncIterator[Connection]:
    """A transaction of the call under way: with its key if it shows one, else of its own.

    Raises:
        Unavailable: as for `Database.transaction`.
    """
    whole = _whole.get()
    if whole is not None:
        yield whole
    else:
        async with database.transaction() as tx:
            yield tx


async def once(tx: Connection, begin: Callable[[], Awaitable[Pending]], *, again: bool = True) -> Pending:
    """What an earlier call with the key of the one under way has begun, else what `begin` begins now.

    Args:
        tx: in which it is begun; nothing is locked in it yet.
        again: whether what came to nothing is begun again.

    Raises:
        IdempotencyConflict: the key is another request's.
    """
    before = await begun_before(tx, in_vain=not again)
    if before is not None:
        return before
    pending = await begin()
    if pending.joined:
        await note(tx, pending.operation_id)
    return pending


async def begun_before(tx: Connection, *, in_vain: bool = False) -> Pending | None:
    """What an earlier call with the key of the one under way has begun.

    Others with the key wait here until the transaction's end.

    Args:
        in_vain: whatever came of it; otherwise only what goes on or has succeeded.

    Raises:
        IdempotencyConflict: the key is another request's.
    """
    call = _call.get()
    if call is None:
        return None
    row = await _claim(tx, call)
    cursor = await tx.execute(_SQL["begun"], {"operation_id": row["operation_id"], "in_vain": in_vain})
    operation = await cursor.fetchone()
    return None if operation is None else Pending(operation["operation_id"], operation["engine_id"])


async def note(tx: Connection, operation_id: UUID) -> None:
    """Writes which operation is what the call under way asked for, if it shows a key."""
    call = _call.get()
    if call is not None:
        await tx.execute(_SQL["note_operation"], {"key_id": call.key_id, "operation_id": operation_id})


class IdempotencyStore:
    """Args:
    database: the registry.
    keyring: encrypts answers, each bound to its key.
    """

    def __init__(self, database: Connections, keyring: EngineKeyring) -> None:
        self._database = database
        self._keyring = keyring

    async def through_operation(self, call: KeyedCall, act: Callable[[], Awaitable[bytes]]) -> bytes:
        """The answer of a call that writes an intent and waits for its end.

        Args:
            act: makes the answer; it begins operations by `once`.

        Raises:
            IdempotencyConflict: the key is another request's.
        """
        kept = await self._kept(call)
        if kept is not None:
            return kept
        under_way = _call.set(call)
        try:
            answer = await act()
            reached("key.acted")
        except ServiceError:
            # The same call may have been answered meanwhile, and what it was about be gone by now.
            kept = await self._kept(call)
            if kept is None:
                raise
            return kept
        finally:
            _call.reset(under_way)
        async with self._database.connection() as connection:
            return await self._keep(connection, call, answer)

    async def in_transaction(self, call: KeyedCall, act: Callable[[], Awaitable[bytes]]) -> bytes:
        """The answer of a call that is a single transaction.

        Args:
            act: makes the answer; it changes the registry by `transaction` alone.

        Raises:
            IdempotencyConflict: the key is another request's.
        """
        async with self._database.transaction() as tx:
            row = await _claim(tx, call)
            if row["answer"] is not None:
                REPLAYS.inc()
                return self._opened(call, row["answer"])
            reached("key.claimed")
            whole = _whole.set(tx)
            try:
                answer = await act()
            finally:
                _whole.reset(whole)
            return await self._keep(tx, call, answer)

    async def drop_expired(self) -> None:
        """Deletes keys whose time is over."""
        deleted = _BATCH
        while deleted == _BATCH:
            async with self._database.connection() as connection:
                cursor = await connection.execute(_SQL["drop_expired"], {"limit": _BATCH})
                deleted = cursor.rowcount

    async def _kept(self, call: KeyedCall) -> bytes | None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["kept"], {"key_id": call.key_id})
            row = await cursor.fetchone()
        if row is None:
            return None
        _check(row, call)
        if row["answer"] is None:
            return None
        REPLAYS.inc()
        return self._opened(call, row["answer"])

    async def _keep(self, connection: Connection, call: KeyedCall, answer: bytes) -> bytes:
        sealed = self._keyring.encrypt(call.key_id, b64encode(answer).decode())
        cursor = await connection.execute(
            _SQL["keep"], {"key_id": call.key_id, "request_hash": call.request_hash, "answer": sealed}
        )
        row = await cursor.fetchone()
        return answer if row is None else self._opened(call, row["answer"])

    def _opened(self, call: KeyedCall, sealed: bytes) -> bytes:
        return b64decode(self._keyring.decrypt(call.key_id, sealed))


async def _claim(tx: Connection, call: KeyedCall) -> dict[str, Any]:
    """Locks the key's row, which is made if need be."""
    values = {"key_id": call.key_id, "request_hash": call.request_hash}
    await tx.execute(_SQL["forget"], values)
    cursor = await tx.execute(_SQL["claim"], values)
    row = await cursor.fetchone()
    assert row is not None, "inserted or updated"
    _check(row, call)
    return row


def _check(row: dict[str, Any], call: KeyedCall) -> None:
    if row["request_hash"] != call.request_hash:
        raise IdempotencyConflict("idempotency-key: another request was made with it")
