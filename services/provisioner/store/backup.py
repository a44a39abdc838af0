"""What a backup needs of the registry: engines that stand still, and a dump."""

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import LeaseLost, OperationKind, Outcome
from services.provisioner.store import migrations, registry_dump
from services.provisioner.store.intents import finish_operation, insert_operation
from services.provisioner.store.rows import load_sql
from services.shared.postgres import Database

_SQL = load_sql("backup")
_ENGINES = load_sql("engines")
_OPERATIONS = load_sql("operations")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a dump of the registry holds.

    Args:
        migrations: those that its schema is made of.
        engines: all but those that are being destroyed.
        images: names of what they run, each with its id behind it if it has one.
    """

    installation_id: UUID
    migrations: list[str]
    products: int
    engines: list[UUID]
    images: list[str]


class BackupStore:
    """Args:
    database: the registry.
    url: of the same, for the programs of PostgreSQL.
    node: whose engines can be copied from here.
    lease_s: after so many seconds a Provisioner lets go of engines whose backup has died.
    """

    def __init__(self, database: Database, url: str, *, node: str, lease_s: float) -> None:
        self._database = database
        self._url = url
        self._node = node
        self._owner = {"owner": uuid4(), "lease_s": lease_s}

    async def other_nodes(self) -> list[str]:
        """Nodes that have engines and are not this one."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["other_nodes"], {"node": self._node})
            return [row["node"] for row in await cursor.fetchall()]

    async def missing_migrations(self) -> list[str]:
        """Those that this version knows and the registry's schema lacks."""
        async with self._database.connection() as connection:
            cursor = await connection.execute("SELECT name FROM schema_migrations")
            done = {row["name"] for row in await cursor.fetchall()}
        return [name for name in migrations.names() if name not in done]

    async def engines(self) -> list[UUID]:
        """This node's engines that belong to a user."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["node_engines"], {"node": self._node})
            return [row["engine_id"] for row in await cursor.fetchall()]

    async def exists(self, engine_id: UUID) -> bool:
        """Whether there is such an engine, and it is to stay."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_ENGINES["engine"], {"engine_id": engine_id})
            row = await cursor.fetchone()
            return row is not None and row["status"] != EngineStatus.DESTROYING

    async def hold(self, engine_id: UUID) -> UUID | None:
        """Begins an operation that keeps all others off the engine; None if one is open, or the engine gone.

        It has to be renewed until it is let go.
        """
        async with self._database.transaction() as tx:
            cursor = await tx.execute(_ENGINES["lock_engine"], {"engine_id": engine_id})
            row = await cursor.fetchone()
            if row is None or row["status"] == EngineStatus.DESTROYING:
                return None
            cursor = await tx.execute(_OPERATIONS["open_operation"], {"engine_id": engine_id})
            if await cursor.fetchone() is not None:
                return None
            operation_id = await insert_operation(tx, engine_id, OperationKind.BACKUP, "operator")
            await tx.execute(_SQL["own_operation"], {**self._owner, "operation_id": operation_id})
            return operation_id

    async def renew(self, operation_id: UUID) -> bool:
        """Whether the engine is still held, and for `lease_s` from now on."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["renew_operation"], {**self._owner, "operation_id": operation_id})
            return cursor.rowcount == 1

    async def let_go(self, operation_id: UUID, engine_id: UUID, outcome: Outcome) -> None:
        """Ends the operation; a destroy that was asked for meanwhile begins.

        Raises:
            LeaseLost: a Provisioner has let go of the engine before.
        """
        async with self._database.transaction() as tx:
            cursor = await tx.execute(_OPERATIONS["hold_operation"], {**self._owner, "operation_id": operation_id})
            row = await cursor.fetchone()
            if row is None:
                raise LeaseLost("it was not held for as long as the copy took")
            await finish_operation(tx, operation_id, outcome)
            if row["cancelled_by"] is not None and row["status"] == EngineStatus.DESTROYING:
                await insert_operation(tx, engine_id, OperationKind.DESTROY, row["cancelled_by"])

    async def dump(self, path: Path) -> Contents:
        """Writes the registry into a file; returns what is in it, both of one moment.

        Raises:
            DumpFailed: PostgreSQL can't.
        """
        connection = await self._database.connect()
        async with connection:
            await connection.set_autocommit(False)
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            await connection.execute("SET idle_in_transaction_session_timeout = 0")
            cursor = await connection.execute("SELECT pg_export_snapshot() AS snapshot")
            row = await cursor.fetchone()
            assert row is not None
            await registry_dump.dump(self._url, path, snapshot=row["snapshot"])
            cursor = await connection.execute(_SQL["contents"])
            contents = await cursor.fetchone()
            assert contents is not None
            return Contents(**contents)
