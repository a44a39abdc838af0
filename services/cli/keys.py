"""`september keys`: what the master keys have encrypted."""

import asyncio
from collections.abc import Iterator

import typer

from services.cli import database
from services.cli.failure import Failure
from services.cli.progress import counted
from services.cli.var_directory import VarDirectory
from services.provisioner.master_key import MasterKeyRotation, Tally
from services.provisioner.settings import BackendKind
from services.provisioner.store.encrypted import EncryptedStore
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database
from services.shared.settings import CommonSettings, load

_MOST_NAMED = 100

app = typer.Typer(help="What the master keys have encrypted.", no_args_is_help=True)


@app.command()
def status() -> None:
    """Say how much is under the first of ORCH_MASTER_KEY, under the others, or can't be read.

    The exit code is 0 if the first master key alone is needed. Without ORCH_DATABASE_URL, every registry under
    ORCH_VAR_DIR is looked at.
    """
    _on_every_registry(rotate=False)


@app.command()
def rotate() -> None:
    """Encrypt anew, under the first of ORCH_MASTER_KEY, what is under the others; then say what `status` says.

    Services may run meanwhile. Ended at any moment, it goes on when it is run again.
    """
    _on_every_registry(rotate=True)


def _on_every_registry(*, rotate: bool) -> None:
    settings = load(CommonSettings)
    keyring = EngineKeyring(settings.master_keys())
    old = unreadable = 0
    for url in _registries(settings):
        for tally in asyncio.run(_counted(url, keyring, rotate=rotate)):
            old += tally.old
            unreadable += len(tally.unreadable)
            typer.echo(
                f"{tally.column}: {tally.current} under the first master key, {tally.old} under others,"
                f" {len(tally.unreadable)} unreadable"
            )
            for name in tally.unreadable[:_MOST_NAMED]:
                typer.echo(f"{tally.column} of {name}: unreadable")
    if unreadable:
        raise Failure(f"{unreadable} can't be read with these master keys, or are another row's")
    if old:
        raise Failure(f"{old} are not under the first master key")


def _registries(settings: CommonSettings) -> Iterator[str]:
    """The given one, else all under the directory, each while it is looked at."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    var = VarDirectory(settings.var_dir)
    data_dirs = [data_dir for data_dir in map(var.registry, BackendKind) if data_dir.exists()]
    if not data_dirs:
        raise Failure(f"there is no registry under {var.path}")
    for data_dir in data_dirs:
        with database.embedded(var, data_dir) as url:
            typer.echo(f"{data_dir}:")
            yield url


async def _counted(url: str, keyring: EngineKeyring, *, rotate: bool) -> list[Tally]:
    registry = Database(url, application_name="september-keys", max_size=1)
    with database.refusals():
        await registry.open()
        try:
            rotation = MasterKeyRotation(EncryptedStore(registry), keyring)
            if rotate:
                typer.echo(f"{await rotation.rotate(counted())} encrypted anew")
            return await rotation.status()
        finally:
            await registry.close()
