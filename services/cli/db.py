"""`september db`: the registry's database."""

import asyncio
from contextlib import nullcontext

import typer

from services.cli import database
from services.cli.var_directory import VarDirectory
from services.shared.settings import StorageSettings, load

app = typer.Typer(help="The registry's database.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `migrate` a command of its own while it is the only one."""


@app.command()
def migrate() -> None:
    """Bring the registry's schema up to date."""
    settings = load(StorageSettings)
    var = VarDirectory(settings.var_dir)
    given = settings.database_url
    with database.embedded(var, var.postgres) if given is None else nullcontext(given) as url:
        for name in asyncio.run(database.bring_up_to_date(url)) or ["nothing to apply"]:
            typer.echo(name)
