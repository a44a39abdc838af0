"""The registry as a file of SQL, by PostgreSQL's own programs."""

import asyncio
import os
import subprocess
from collections.abc import Collection
from importlib.resources import as_file, files
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict

from services.shared import embedded_postgres

# What only counts for those who run now: shares of the rate limit, replicas, what has just changed.
_PASSING = ("admission_replicas", "changes", "ports_set_aside", "rate_grants", "rate_replicas", "rate_shares")
_OF_ENVIRONMENT = {
    "host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER",
    "password": "PGPASSWORD", "passfile": "PGPASSFILE", "service": "PGSERVICE", "options": "PGOPTIONS",
    "sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT", "sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY",
    "channel_binding": "PGCHANNELBINDING", "target_session_attrs": "PGTARGETSESSIONATTRS",
}  # fmt: skip


class DumpFailed(Exception):
    """PostgreSQL can't dump or restore; says why in its own words."""


async def dump(url: str, path: Path, *, snapshot: str) -> None:
    """Writes the registry into `path`.

    Args:
        snapshot: exported by a transaction that is still open.

    Raises:
        DumpFailed
    """
    options = ["--no-owner", "--no-privileges", f"--snapshot={snapshot}", f"--file={path}"]
    await _run("pg_dump", url, [*options, *(f"--exclude-table-data={table}" for table in _PASSING)])


async def restore(url: str, path: Path, *, omitted: Collection[UUID]) -> None:
    """Fills an empty database from `path`, all or nothing.

    Args:
        omitted: engines in it that are not to come back.

    Raises:
        DumpFailed
    """
    with as_file(files("services.provisioner") / "sql" / "restored.sql") as restored:
        options = ["--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", "--output=/dev/null"]
        ids = "{" + ",".join(map(str, omitted)) + "}"
        await _run("psql", url, [*options, f"--set=omitted={ids}", f"--file={path}", f"--file={restored}"])


async def is_empty(url: str) -> bool:
    """Whether the database has no table yet.

    Raises:
        psycopg.Error: PostgreSQL can't be reached.
    """
    async with await psycopg.AsyncConnection.connect(url, connect_timeout=5) as connection:
        cursor = await connection.execute(
            "SELECT FROM pg_class WHERE relnamespace = current_schema()::regnamespace LIMIT 1"
        )
        return await cursor.fetchone() is None


async def _run(program: str, url: str, options: list[str]) -> None:
    async with await psycopg.AsyncConnection.connect(url, connect_timeout=5) as connection:
        version = connection.info.server_version // 10_000
    parameters = {name: value for name, value in conninfo_to_dict(url).items() if value is not None}
    # What the URL leaves open is the caller's to say, to these programs as to psycopg.
    kept = {name: value for name, value in os.environ.items() if name.startswith("PG") or name in ("HOME", "PATH")}
    # On the command line everybody on this host could read a password.
    environment = {_OF_ENVIRONMENT[name]: str(value) for name, value in parameters.items() if name in _OF_ENVIRONMENT}
    ended = await asyncio.to_thread(
        subprocess.run,
        [str(embedded_postgres.program(program, version)), "--no-password", *options],
        env={**kept, "LC_ALL": "C", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode != 0:
        raise DumpFailed(f"{program}: {ended.stderr.strip()[-2000:]}")
