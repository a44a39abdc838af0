"""`september db`: the registry's database."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import typer

from services.cli import database
from services.cli.var_directory import InUse, VarDirectory
from services.shared import embedded_postgres
from services.shared.settings import StorageSettings, load

app = typer.Typer(help="The registry's database.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `migrate` a command of its own while it is the only one."""


@app.command()
def migrate() -> None:
    """Bring the registry's schema up to date."""
    with _database(load(StorageSettings)) as url:
        for name in asyncio.run(database.bring_up_to_date(url)) or ["nothing to apply"]:
            typer.echo(name)


@contextmanager
def _database(settings: StorageSettings) -> Iterator[str]:
    """The database's URL; an embedded one that did not run before is stopped at the end."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    var = VarDirectory(settings.var_dir)
    with ExitStack() as stack:
        try:
            stack.enter_context(var.exclusive())
            ours = not embedded_postgres.is_running(var.postgres)
        except InUse:
            # Whoever runs the platform also ends its PostgreSQL.
            ours = False
        if ours:
            stack.callback(embedded_postgres.stop, var.postgres)
        yield database.start_embedded(var.postgres, var.log("postgresql"))
