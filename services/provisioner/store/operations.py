"""Operations as the workers see them: claimed by lease, carried out, finished.

Every write names the owner, so that a process that lost its lease to another changes nothing: to take
an operation over is to change its owner, in the same row. While nobody has, a late write harms nobody.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import datetime
from uuid import UUID

from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.operation import (
    SYSTEM,
    LeaseLost,
    Operation,
    OperationKind,
    Outcome,
    Queue,
    Settled,
    Step,
)
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.domain.transitions import TRANSITIONS, YIELDS
from services.provisioner.metrics import GIVEN_UP
from services.provisioner.store.intents import finish_operation, insert_operation
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.rows import load_sql, to_engine, to_operation, to_settled
from services.shared.errors import ServiceError
from services.shared.postgres import Connection, Database

_ENGINES = load_sql("engines")
_OPERATIONS = load_sql("operations")


_KINDS = [kind.value for kind in OperationKind]
_STEPS = [step.value for step in Step]


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
        restarts: when a failed engine is started again.
        stale_ok_s: how long an Admission may go on without the registry, in seconds.
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
        restarts: RestartPolicy,
        stale_ok_s: float,
    ) -> None:
        self._database = database
        self._claimant = {"owner": owner, "node": node, "lease_s": lease_s, "boot_timeout_s": boot_timeout_s}
        self._ports = ports
        self._url_of = url_of
        self._restarts = restarts
        self._stale_ok_s = stale_ok_s

    async def claim(self, places: Mapping[Queue, int], running: Collection[UUID]) -> list[Operation]:
        """Takes operations that nobody works on; products take turns, each with its longest waiting first.

        A product that has some under way comes after those that have fewer.

        Args:
            places: how many to take of each queue, at most.
            running: those that run in this process still, with or without a lease: not again, and
                neither those of a kind or at a step that this version does not know.
        """
        values = {
            **self._claimant,
            "queues": list(places),
            "places": list(places.values()),
            "running": list(running),
            "kinds": _KINDS,
            "steps": _STEPS,
        }
        async with self._database.connection() as connection:
            cursor = await connection.execute(_OPERATIONS["claim_operations"], values)
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

    async def clock(self) -> datetime:
        """What time it is, on the one clock that decides."""
        async with self._database.connection() as connection:
            cursor = await connection.execute("SELECT clock_timestamp() AS at")
            row = await cursor.fetchone()
            assert row is not None
            at: datetime = row["at"]
            return at

    async def all_flushed(self, since: datetime) -> bool:
        """Whether every Admission has told of all that it admitted before this moment."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                _ENGINES["unflushed_replicas"], {"since": since, "stale_ok_s": self._stale_ok_s}
            )
            row = await cursor.fetchone()
            return row is not None and row["replicas"] == 0

    async def wanted(self, operation: Operation) -> str | None:
        """Why the engine must not sleep, as far as Admission knows: admitted to, or kept awake."""
        async with self._database.connection() as connection:
            values = {"operation_id": operation.operation_id, "stale_ok_s": self._stale_ok_s}
            cursor = await connection.execute(_ENGINES["wanted"], values)
            row = await cursor.fetchone()
        if row is None:
            return None
        if row["admitted"]:
            return "it was admitted to"
        return "it is kept awake" if row["held"] else None

    async def set_pending_key(self, operation: Operation, encrypted_key: bytes) -> None:
        """Writes the key that the engine is to be given, unless one is written already."""
        async with self._database.transaction() as tx:
            await self._hold(tx, operation)
            values = {"engine_id": operation.engine_id, "pending_key": encrypted_key}
            await tx.execute(_ENGINES["set_pending_key"], values)

    async def recreate_with_pending_key(self, operation: Operation) -> None:
        """Commits the pending key for an instance that is yet to be made; until then the engine boots."""
        async with self._database.transaction() as tx:
            await self._hold(tx, operation)
            values = {"engine_id": operation.engine_id, "status": EngineStatus.PROVISIONING, "reason": None}
            await tx.execute(_ENGINES["commit_pending_key"], values)
            await tx.execute(_ENGINES["set_status"], values)
            await tx.execute(
                _OPERATIONS["set_step"],
                {
                    **self._claimant,
                    "operation_id": operation.operation_id,
                    "step": Step.CREATING,
                    "error_code": None,
                    "error_message": None,
                },
            )

    async def set_step(self, operation: Operation, step: Step, failure: ServiceError | None = None) -> None:
        """Writes how far the operation is, before the step's effect, and why it failed if it did."""
        await self._write(
            "set_step",
            operation,
            step=step,
            error_code=None if failure is None else failure.code,
            error_message=None if failure is None else failure.message,
        )

    async def pin_image(self, operation: Operation, image_id: str | None) -> None:
        """Writes which image the engine is made of, from now on."""
        await self._write("pin_image", operation, image_id=image_id)

    async def set_probes(self, operation: Operation, probes: int) -> None:
        """Writes how many probes the boot has made."""
        await self._write("set_probes", operation, probes=probes)

    async def release(self, operation: Operation, pause_s: float) -> None:
        """Gives the operation back unfinished; nobody takes it up for `pause_s` seconds."""
        await self._write("release_operation", operation, pause_s=pause_s)

    async def quarantine(self, operation: Operation) -> None:
        """Takes the operation out of the workers' way until an operator, or a destroy, ends it."""
        await self._write("quarantine_operation", operation)
        async with self._database.connection() as connection:
            await connection.execute(_OPERATIONS["notify"], {"news": "ended"})

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

    async def finish(self, operation: Operation, outcome: Outcome, failure: ServiceError | None = None) -> Settled:
        """Writes what became of the engine, as the table of transitions says, and ends the operation.

        All in one transaction. If a destroy was asked for meanwhile, the operation ends as
        cancelled and the destroy's own operation begins.

        Raises:
            LeaseLost: another process has taken the operation over; nothing is written.
        """
        # There is none for a backup, which is cancelled here and leaves the engine as it is.
        transition = TRANSITIONS.get(operation.kind)
        if transition is None:
            after = None
        else:
            after = transition.success if outcome is Outcome.SUCCEEDED else transition.failure
        # What gave way has made something, which only the destroy that follows takes away.
        gone = transition is not None and after is None and outcome is not Outcome.CANCELLED
        async with self._database.transaction() as tx:
            status, canceller = await self._hold(tx, operation)
            to_be_destroyed = status == EngineStatus.DESTROYING
            given_up = False
            if gone:
                await tx.execute(_ENGINES["release_port"], {"engine_id": operation.engine_id})
                await tx.execute(_ENGINES["delete_engine"], {"engine_id": operation.engine_id})
            elif to_be_destroyed or after is None:
                outcome, failure = Outcome.CANCELLED, None
            else:
                given_up = await self._settle_engine(tx, operation, after, outcome, failure)
            settled = await finish_operation(
                tx,
                operation.operation_id,
                outcome,
                None if failure is None else failure.code,
                None if failure is None else failure.message,
            )
            if given_up:
                await tx.execute(_OPERATIONS["insert_gave_up_event"], {"operation_id": operation.operation_id})
            if to_be_destroyed and not gone and canceller is not None:
                await insert_operation(tx, operation.engine_id, OperationKind.DESTROY, canceller)
        GIVEN_UP.inc(given_up)
        return to_settled(settled)

    async def _settle_engine(
        self, tx: Connection, operation: Operation, after: EngineStatus, outcome: Outcome, failure: ServiceError | None
    ) -> bool:
        """Writes the engine's status after the operation; whether automatic restarts are given up."""
        reason = None if failure is None else failure.message
        values: dict[str, object] = {"engine_id": operation.engine_id, "status": after, "reason": reason}
        kind = operation.kind
        # Automatic starts count, whatever comes of them, until the engine was well for long or somebody starts it.
        starts = kind in (OperationKind.START, OperationKind.RESTART)
        tried = int(starts and operation.actor == SYSTEM)
        if kind is OperationKind.SLEEP and after is EngineStatus.RUNNING:
            await tx.execute(_ENGINES["set_busy"], {**values, "reason": reason or "it was wanted"})
        elif after is EngineStatus.RUNNING:
            if kind is OperationKind.ROTATE_KEY:
                await tx.execute(_ENGINES["commit_pending_key"], values)
            await tx.execute(_ENGINES["set_running"], {**values, "tried": tried, "afresh": starts and not tried})
        elif kind in YIELDS:
            deep = kind is OperationKind.DEEP_SLEEP and outcome is Outcome.SUCCEEDED
            await tx.execute(_ENGINES["set_asleep"], {**values, "deep": deep})
        elif after is EngineStatus.FAILED:
            await tx.execute(_ENGINES["drop_pending_key"], values)
            cursor = await tx.execute(_ENGINES["set_failed"], {**values, **asdict(self._restarts), "tried": tried})
            row = await cursor.fetchone()
            return bool(tried and row is not None and row["given_up"])
        else:
            await tx.execute(_ENGINES["set_status"], values)
        return False

    async def _hold(self, tx: Connection, operation: Operation) -> tuple[str, str | None]:
        """Locks engine and operation as its owner; returns the status, and who asked it to give way, if anybody."""
        cursor = await tx.execute(
            _OPERATIONS["hold_operation"], {**self._claimant, "operation_id": operation.operation_id}
        )
        row = await cursor.fetchone()
        if row is None:
            raise LeaseLost(operation.operation_id)
        return row["status"], row["cancelled_by"]

    async def _write(self, name: str, operation: Operation, **values: object) -> None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                _OPERATIONS[name], {**self._claimant, "operation_id": operation.operation_id, **values}
            )
            if cursor.rowcount == 0:
                raise LeaseLost(operation.operation_id)
