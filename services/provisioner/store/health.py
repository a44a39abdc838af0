"""What probes have found, written where it counts."""

from collections.abc import Collection
from dataclasses import asdict
from uuid import UUID

from services.provisioner.domain.audit import AuditAction
from services.provisioner.domain.health import Patient
from services.provisioner.domain.operation import SYSTEM
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.store.rows import load_sql
from services.shared.postgres import Connection, Connections

_ENGINES = load_sql("engines")
_HEALTH = load_sql("health")
_OPERATIONS = load_sql("operations")


class HealthStore:
    """The health of one node's engines.

    Args:
        database: the registry.
        node: whose engines.
        max_failures: probes that fail in a row before the engine is failed.
        restarts: when a failed engine is started again.
    """

    def __init__(self, database: Connections, *, node: str, max_failures: int, restarts: RestartPolicy) -> None:
        self._database = database
        self._node = node
        self._max_failures = max_failures
        self._restarts = restarts

    async def running(self) -> list[Patient]:
        """All engines that run and have no operation open."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_HEALTH["running_engines"], {"node": self._node})
            return [Patient(**row) for row in await cursor.fetchall()]

    async def mark_well(self, engine_ids: Collection[UUID]) -> None:
        """Writes that these engines have answered well, all in one statement.

        An engine that has run for longer than the longest pause between restarts is as good as new:
        its restarts are forgotten.
        """
        values = {"engine_ids": list(engine_ids), "backoff_max_s": self._restarts.backoff_max_s}
        async with self._database.connection() as connection:
            await connection.execute(_HEALTH["mark_well"], values)

    async def mark_ill(self, patient: Patient, reason: str, *, ended: bool) -> bool:
        """Counts a failed probe, and fails the engine if it was one too many.

        Nothing if an operation has begun since, or ended: the engine is not the one that was probed.

        Args:
            reason: for the history.
            ended: its instance runs no more, so that there is nothing to wait for.

        Returns:
            Whether the engine is failed now.
        """
        values = {"engine_id": patient.engine_id, "since": patient.since, "failures": patient.failures}
        async with self._database.transaction() as tx:
            # A statement of its own: what comes after it sees the operation of whoever had the lock before.
            await tx.execute(_ENGINES["lock_engine"], values)
            cursor = await tx.execute(_HEALTH["count_failure"], values)
            row = await cursor.fetchone()
            if row is None or not (ended or row["health_failures"] >= self._max_failures):
                return False
            await self._fail(tx, patient.engine_id, reason)
        return True

    async def _fail(self, tx: Connection, engine_id: UUID, reason: str) -> None:
        values = {"engine_id": engine_id, "actor": SYSTEM, "reason": reason}
        cursor = await tx.execute(_ENGINES["set_failed"], {**values, **asdict(self._restarts), "tried": 0})
        row = await cursor.fetchone()
        assert row is not None, "updated under its lock"
        await tx.execute(_HEALTH["insert_audit_event"], {**values, "action": AuditAction.HEALTH_FAILED})
        if row["given_up"]:
            await tx.execute(_HEALTH["insert_audit_event"], {**values, "action": AuditAction.AUTO_RESTART_GAVE_UP})
        await tx.execute(_OPERATIONS["notify"], {"news": "failed"})

    async def due_restarts(self, limit: int) -> list[UUID]:
        """Failed engines whose next restart is due, the longest waiting first."""
        values = {"node": self._node, "limit": limit, "backoff_max_s": self._restarts.backoff_max_s}
        async with self._database.connection() as connection:
            cursor = await connection.execute(_HEALTH["due_restarts"], values)
            return [row["engine_id"] for row in await cursor.fetchall()]
