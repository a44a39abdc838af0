"""Operations as the workers see them: claimed by lease, carried out, finished.

Every write names the owner, so that a process that lost its lease changes nothing.
"""

from collections.abc import Callable, Collection
from uuid import UUID

from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.operation import Ending, LeaseLost, Operation, OperationKind, Outcome, Settled, Step
from services.provisioner.store.intents import finish_operation, insert_operation
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.rows import load_sql, to_engine, to_operation, to_settled
from services.shared.errors import ServiceError
from services.shared.postgres import Connection, Database

_ENGINES = load_sql("engines")
_OPERATIONS = load_sql("operations")


class OperationStore:
    """The operations of one node, claimed for one process.

    Args:
        database: the registry.
        owner: random per start of a process, so that no process takes another's lease for its own.
        node: whose backend this process reaches.
        lease_s: how long a claim holds without renewal, in seconds.
        boot_timeout_s: how long a boot may take from its first claim, in seconds.
        ports: gives an engine another port when the host refuses its own.
        url_of: URL of an engine by its id and port.
    """

    def __init__(
        self,
        database: Database,
        *,
        owner: UUID,
        node: str,
        lease_s: float,
        boot_timeout_s: float,
        ports: PortAllocator,
        url_of: Callable[[UUID, int], str],
    ) -> None:
        self._database = database
        self._claimant = {"owner": owner, "node": node, "lease_s": lease_s, "boot_timeout_s": boot_timeout_s}
        self._ports = ports
        self._url_of = url_of

    async def claim(self, limit: int) -> list[Operation]:
        """Takes up to `limit` operations that nobody works on, the longest waiting first."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_OPERATIONS["claim_operations"], {**self._claimant, "limit": limit})
            return [to_operation(row) for row in await cursor.fetchall()]

    async def renew(self, operation_ids: Collection[UUID]) -> dict[UUID, bool]:
        """Renews leases; those still held, each with whether it has to give way."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                _OPERATIONS["renew_leases"], {**self._claimant, "operation_ids": list(operation_ids)}
            )
            return {row["operation_id"]: row["cancelled"] for row in await cursor.fetchall()}

    async def settled(self, operation_ids: Collection[UUID]) -> list[Settled]:
        """Those of the given operations that are finished or quarantined."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_OPERATIONS["settled_operations"], {"operation_ids": list(operation_ids)})
            return [to_settled(row) for row in await cursor.fetchall()]

    async def engine(self, engine_id: UUID) -> Engine:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_ENGINES["engine"], {"engine_id": engine_id})
            row = await cursor.fetchone()
            assert row is not None, "an engine outlives its open operation"
            return to_engine(row)

    async def engines_of_node(self) -> list[Engine]:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_ENGINES["engines_of_node"], self._claimant)
            return [to_engine(row) for row in await cursor.fetchall()]

    async def set_step(self, operation: Operation, step: Step, failure: ServiceError | None = None) -> None:
        """Writes how far the operation is, before the step's effect, and why it failed if it did."""
        await self._write(
            "set_step",
            operation,
            step=step,
            error_code=None if failure is None else failure.code,
            error_message=None if failure is None else failure.message,
        )

    async def release(self, operation: Operation, pause_s: float) -> None:
        """Gives the operation back unfinished; nobody takes it up for `pause_s` seconds."""
        await self._write("release_operation", operation, pause_s=pause_s)

    async def quarantine(self, operation: Operation) -> None:
        """Takes the operation out of the workers' way until an operator, or a destroy, ends it."""
        await self._write("quarantine_operation", operation)
        async with self._database.connection() as connection:
            await connection.execute(_OPERATIONS["notify"])

    async def swap_port(self, operation: Operation, engine: Engine) -> bool:
        """Sets the engine's port aside and leases another; False if none is left."""
        async with self._database.transaction() as tx:
            await self._hold(tx, operation)
            await tx.execute(_ENGINES["release_port"], {"engine_id": engine.engine_id})
            if engine.port is not None:
                await self._ports.set_aside(tx, engine.port)
            port = await self._ports.lease(tx, engine.engine_id)
            if port is not None:
                url = self._url_of(engine.engine_id, port)
                await tx.execute(_ENGINES["set_url"], {"engine_id": engine.engine_id, "url": url})
            return port is not None

    async def finish(
        self, operation: Operation, ending: Ending, *, error_code: str | None = None, error_message: str | None = None
    ) -> Settled:
        """Writes what became of the engine and ends the operation, in one transaction.

        If a destroy was asked for meanwhile, the operation ends as cancelled and the destroy's own
        operation begins in the same transaction.

        Raises:
            LeaseLost: another process has taken the operation over; nothing is written.
        """
        async with self._database.transaction() as tx:
            await tx.execute(_ENGINES["lock_engine"], {"engine_id": operation.engine_id})
            destroyer = await self._hold(tx, operation)
            outcome = Outcome.SUCCEEDED if error_code is None else Outcome.FAILED
            if ending is Ending.GONE:
                await tx.execute(_ENGINES["release_port"], {"engine_id": operation.engine_id})
                await tx.execute(_ENGINES["delete_engine"], {"engine_id": operation.engine_id})
            elif destroyer is not None:
                outcome = Outcome.CANCELLED
            elif ending is Ending.RUNNING:
                await tx.execute(_ENGINES["set_running"], {"engine_id": operation.engine_id})
            else:
                await tx.execute(
                    _ENGINES["set_status"], {"engine_id": operation.engine_id, "status": EngineStatus.FAILED}
                )
            row = await finish_operation(tx, operation.operation_id, outcome, error_code, error_message)
            if outcome is Outcome.CANCELLED and destroyer is not None:
                await insert_operation(tx, operation.engine_id, OperationKind.DESTROY, destroyer)
        return to_settled(row)

    async def _hold(self, tx: Connection, operation: Operation) -> str | None:
        """Locks the operation as its owner; returns who asked it to give way to a destroy, if anybody."""
        cursor = await tx.execute(
            _OPERATIONS["hold_operation"], {**self._claimant, "operation_id": operation.operation_id}
        )
        row = await cursor.fetchone()
        if row is None:
            raise LeaseLost(operation.operation_id)
        destroyer: str | None = row["cancelled_by"]
        return destroyer

    async def _write(self, name: str, operation: Operation, **values: object) -> None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                _OPERATIONS[name], {**self._claimant, "operation_id": operation.operation_id, **values}
            )
            if cursor.rowcount == 0:
                raise LeaseLost(operation.operation_id)
