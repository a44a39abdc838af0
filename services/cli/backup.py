"""`september backup` and `september restore`: the registry and the data of all engines."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from services.cli import database
from services.cli.failure import Failure
from services.cli.progress import counted
from services.cli.var_directory import VarDirectory
from services.provisioner.backends.chosen import backend_of, volumes_of
from services.provisioner.backends.volumes import Volumes
from services.provisioner.backup import LEASE_S, BackedUp, back_up
from services.provisioner.backup_manifest import Refused
from services.provisioner.restore import Restored
from services.provisioner.restore import restore as restore_from
from services.provisioner.settings import BackendKind, BackendSettings
from services.provisioner.store.backup import BackupStore
from services.provisioner.store.installation import installation_id
from services.provisioner.store.registry_dump import DumpFailed
from services.shared.postgres import Database
from services.shared.settings import load

Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Of the backup.")]
Backend = Annotated[
    BackendKind | None,
    typer.Option(help="What runs engines, if it is not ORCH_ENGINE_BACKEND that says so; as told to `up`."),
]


def backup(directory: Directory, backend: Backend = None) -> None:
    """Copy the registry and the data of this host's engines into a new directory.

    The platform may run meanwhile; each engine stands still while its data is copied. The master key is not copied.
    """
    settings = _settings(backend)
    with _failures(), _registry(settings) as url:
        made = asyncio.run(_back_up(directory, url, settings))
    manifest = made.manifest
    typer.echo(f"{len(manifest.engines)} engines of {manifest.products} products: {directory}")
    for image in manifest.images:
        typer.echo(f"image {image}")
    if made.missing:
        whys = "".join(f"\n  {engine_id}: {why}" for engine_id, why in sorted(made.missing.items()))
        raise Failure(f"{len(made.missing)} engines are not in the backup:{whys}")


def restore(directory: Directory, backend: Backend = None) -> None:
    """Restore a backup, where there is no registry yet and the platform does not run.

    The backup is verified before anything is touched. Data of engines that is there already is kept as it is.
    """
    settings = _settings(backend)
    with _failures(), _registry(settings, make=True) as url:
        restored = asyncio.run(_restore(directory, url, settings))
    manifest = restored.manifest
    typer.echo(f"{len(manifest.engines)} engines of {manifest.products} products, as of {manifest.made_at:%F %T} UTC")
    for engine_id in restored.kept:
        typer.echo(f"{engine_id}: its data was there already, and is kept")


async def _back_up(directory: Path, url: str, settings: BackendSettings) -> BackedUp:
    registry = Database(url, application_name="september-backup", max_size=2)
    await registry.open()
    try:
        installation = await installation_id(registry)
        store = BackupStore(registry, url, node=settings.node, lease_s=LEASE_S)
        if nodes := await store.other_nodes():
            raise Refused(f"engines of other nodes can't be copied from here: {', '.join(nodes)}")
        if missing := await store.missing_migrations():
            raise Refused(f"the registry's schema is not up to date, {missing[0]} is missing: `september db migrate`")
        backend, volumes = backend_of(settings, installation), volumes_of(settings, installation)
        await backend.open()
        volumes.open()
        try:
            return await back_up(directory, store, backend, volumes, kind=settings.engine_backend, told=counted())
        finally:
            volumes.close()
            await backend.close()
    finally:
        await registry.close()


async def _restore(directory: Path, url: str, settings: BackendSettings) -> Restored:
    def volumes(installation: UUID) -> Volumes:
        return volumes_of(settings, installation)

    return await restore_from(directory, url, volumes, kind=settings.engine_backend, told=counted())


def _settings(backend: BackendKind | None) -> BackendSettings:
    if backend is not None:
        os.environ["ORCH_ENGINE_BACKEND"] = backend
    if load(BackendSettings).database_url is None:
        # What `up` takes if nothing is said, and the registry is its.
        os.environ.setdefault("ORCH_ENGINE_BACKEND", BackendKind.PROCESS)
    return load(BackendSettings)


@contextmanager
def _registry(settings: BackendSettings, *, make: bool = False) -> Iterator[str]:
    if settings.database_url is not None:
        yield settings.database_url
        return
    var = VarDirectory(settings.var_dir)
    data_dir = var.registry(settings.engine_backend)
    if not make and not data_dir.exists():
        raise Failure(f"there is no registry in {data_dir}")
    with database.embedded(var, data_dir) as url:
        yield url


@contextmanager
def _failures() -> Iterator[None]:
    try:
        with database.refusals():
            yield
    except (Refused, DumpFailed) as error:
        raise Failure(str(error)) from error
