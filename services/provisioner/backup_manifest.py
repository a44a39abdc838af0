"""What a backup is and holds, and whether it is still whole."""

from datetime import datetime
from hashlib import file_digest
from pathlib import Path
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

_FORMAT = 1
_MANIFEST = "manifest.json"
_REGISTRY = "registry.sql"


class Refused(Exception):
    """There can be no such backup, or it can't be restored here; says why."""


class Entry(BaseModel):
    """One file of the backup."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Entry":
        with path.open("rb") as file:
            return cls(bytes=path.stat().st_size, sha256=file_digest(file, "sha256").hexdigest())


class Manifest(BaseModel):
    """What the backup is and holds; written last, so that without it there is no backup.

    Args:
        migrations: what the registry's schema is made of.
        engines: those that come back, each with its volume's copy if it had a volume.
        omitted: engines in the registry's dump that do not come back.
        images: what engines run, by name and id; the host that they are restored on needs those.
        files: all other files of the directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = _FORMAT
    made_at: datetime
    installation_id: UUID
    backend: str
    migrations: list[str]
    products: int
    engines: list[UUID]
    omitted: list[UUID]
    images: list[str]
    files: dict[str, Entry]


def verified(directory: Path) -> Manifest:
    """The manifest of a backup of which nothing is missing and nothing was changed.

    Raises:
        Refused: it is not whole; names the file.
    """
    try:
        manifest = Manifest.model_validate_json((directory / _MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise Refused(f"{directory / _MANIFEST} is not the manifest of a backup") from error
    if manifest.format != _FORMAT:
        raise Refused(f"the backup has format {manifest.format}, and this version knows {_FORMAT}")
    found = contents_of(directory)
    for name in sorted({*manifest.files, *found, _REGISTRY}):
        if name not in found or found[name] != manifest.files.get(name):
            raise Refused(f"{directory / name} is not as it was when the backup was made")
    return manifest


def begin(directory: Path) -> None:
    """Makes the directory, for its owner alone.

    Raises:
        Refused: there is something in it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise Refused(f"{directory} is not empty")


def write(directory: Path, manifest: Manifest) -> None:
    """Makes a backup of what is in the directory; until then it is none."""
    draft = directory / f"{_MANIFEST}.draft"
    draft.write_text(manifest.model_dump_json(indent=1) + "\n")
    draft.replace(directory / _MANIFEST)


def contents_of(directory: Path) -> dict[str, Entry]:
    """Every file of the directory but the manifest."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if not path.is_dir()}
    return {name: Entry.of(path) for name, path in sorted(found.items()) if name != _MANIFEST}


def registry_file(directory: Path) -> Path:
    """Where the registry's dump is."""
    return directory / _REGISTRY


def volume_file(directory: Path, engine_id: UUID) -> Path:
    """Where the copy of an engine's volume is; there is none if the engine had no volume."""
    return directory / f"{engine_id}.tar"


def drop_volume(directory: Path, engine_id: UUID) -> None:
    """Takes a copy out of a backup that isn't written yet."""
    volume_file(directory, engine_id).unlink(missing_ok=True)
