"""The registry's PostgreSQL, as commands start it and bring its schema up to date."""

import subprocess
from pathlib import Path

import psycopg

from services.cli.failure import Failure
from services.provisioner.store.migrations import migrate
from services.shared import embedded_postgres


def start_embedded(data_dir: Path) -> str:
    """Starts the embedded PostgreSQL, or finds it running; returns its URL. Blocks.

    Raises:
        Failure: it does not start.
    """
    try:
        return embedded_postgres.start(data_dir)
    except RuntimeError as error:
        raise Failure(f"PostgreSQL: {error}") from error
    except subprocess.SubprocessError as error:
        raise Failure(f"PostgreSQL does not start; {data_dir / 'log'} says why") from error


async def bring_up_to_date(url: str) -> list[str]:
    """Applies the migrations that are missing; returns their names.

    Raises:
        Failure: PostgreSQL refuses one.
        Unavailable: it can't be reached.
    """
    try:
        return await migrate(url)
    except psycopg.Error as error:
        raise Failure(f"the registry's schema: {error.diag.message_primary or error}") from error
