"""The registry's schema: numbered files, each applied once, in order, in a transaction of its own."""

import asyncio
from importlib.resources import files
from importlib.resources.abc import Traversable

import psycopg
import structlog

from services.shared.errors import Unavailable
from services.shared.failpoints import reached

log = structlog.get_logger(__name__)

# Any number that nothing else in the database uses for an advisory lock.
_LOCK = 7_267_356_001
_LOCK_TIMEOUT_S = 2
_PAUSE_S = 1.0


def names() -> list[str]:
    """Names of all migrations that this version knows, in order."""
    return [script.name for script in _scripts()]


def _scripts() -> list[Traversable]:
    folder = files("services.provisioner") / "sql" / "migrations"
    return sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)


async def migrate(url: str) -> list[str]:
    """Brings the registry's schema up to date; returns the names of what was applied.

    Several processes may call it at once: each script is applied under an advisory lock, by one of
    them. The lock ends with the script's transaction, since behind a pooler nothing else ends with the
    caller. The connection is its own, without the pool's time limits.

    Raises:
        Unavailable: PostgreSQL can't be reached.
    """
    scripts = _scripts()
    try:
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=5, prepare_threshold=None, target_session_attrs="read-write"
        )
    except psycopg.OperationalError as error:
        log.warning("registry_unreachable", error=str(error))
        raise Unavailable("the registry can't be reached") from error
    async with connection:
        applied = []
        for script in scripts:
            while True:
                try:
                    if await _apply(connection, script):
                        log.info("migration_applied", name=script.name)
                        applied.append(script.name)
                    break
                except psycopg.errors.LockNotAvailable:
                    # Whoever wants the table meanwhile would wait behind it: give way, and try again.
                    log.warning("migration_waits", name=script.name)
                    await asyncio.sleep(_PAUSE_S)
        return applied


async def _apply(connection: psycopg.AsyncConnection, script: Traversable) -> bool:
    """Applies one script; False if that was done before."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations ("
            " name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        cursor = await connection.execute("SELECT 1 FROM schema_migrations WHERE name = %s", [script.name])
        if await cursor.fetchone():
            return False
        await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'".encode())
        await connection.execute(script.read_text(encoding="utf-8").encode())
        reached("migration.applied")
        await connection.execute("INSERT INTO schema_migrations (name) VALUES (%s)", [script.name])
    reached("migration.committed")
    return True
