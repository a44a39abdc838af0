"""Restoring a backup where there is no registry yet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from services.provisioner.backends.volumes import Volumes
from services.provisioner.backup_manifest import Manifest, Refused, registry_file, verified, volume_file
from services.provisioner.store import migrations, registry_dump


@dataclass(frozen=True, slots=True)
class Restored:
    """`kept`: engines whose volume was there already, and was not touched."""

    manifest: Manifest
    kept: list[UUID]


async def restore(
    directory: Path,
    url: str,
    volumes: Callable[[UUID], Volumes],
    *,
    kind: str,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Restored:
    """Restores volumes, and then the registry, in one transaction: until that, all may be repeated.

    Args:
        directory: with the backup; it is verified before anything is touched.
        url: of an empty database.
        volumes: of an installation.
        kind: of backend.
        told: how many engines of how many are done.

    Raises:
        Refused, DumpFailed, BackendError, Unavailable, OSError.
    """
    manifest = verified(directory)
    if manifest.backend != kind:
        raise Refused(f"the backup's engines are run by the backend {manifest.backend}, not by {kind}")
    if unknown := sorted(set(manifest.migrations) - set(migrations.names())):
        raise Refused(f"the backup was made by a later version: {unknown[0]} is not known here")
    if not await registry_dump.is_empty(url):
        raise Refused("there is a registry already; a backup is restored into an empty database")
    kept = []
    target = volumes(manifest.installation_id)
    target.open()
    try:
        for done, engine_id in enumerate(manifest.engines):
            told(done, len(manifest.engines))
            copy = volume_file(directory, engine_id)
            if copy.exists() and not target.restore(engine_id, copy):
                kept.append(engine_id)
    finally:
        target.close()
    await registry_dump.restore(url, registry_file(directory), omitted=manifest.omitted)
    await migrations.migrate(url)
    return Restored(manifest, kept)
