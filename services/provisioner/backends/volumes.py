"""Copies of engines' volumes, as archives with a directory `data`."""

import shutil
import tarfile
from pathlib import Path
from typing import Protocol
from uuid import UUID

from services.provisioner.backends.engine_directory import EngineDirectory


class Volumes(Protocol):
    """Blocking, and as slow as the volumes are large. Errors: `BackendError`, `Unavailable`, `OSError`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def save(self, engine_id: UUID, archive: Path) -> bool:
        """Copies the volume of an engine, which must not write to it meanwhile; False if it has none."""
        ...

    def restore(self, engine_id: UUID, archive: Path) -> bool:
        """Makes the engine's volume from its copy; False if it has one already, which is left as it is.

        What a call that ended halfway has left is no volume of the engine's, and is made anew.
        """
        ...


class DirectoryVolumes:
    """Those of the process backend.

    Args:
        data_dir: as that has it.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def open(self) -> None:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def close(self) -> None:
        pass

    def save(self, engine_id: UUID, archive: Path) -> bool:
        volume = EngineDirectory(self._data_dir, engine_id).volume
        if not volume.is_dir():
            return False
        with tarfile.open(archive, "w") as tar:
            tar.add(volume, "data")
        return True

    def restore(self, engine_id: UUID, archive: Path) -> bool:
        directory = EngineDirectory(self._data_dir, engine_id)
        if directory.path.exists():
            return False
        # Has the engine's name only once it is whole.
        draft = directory.path.with_suffix(".restoring")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        with tarfile.open(archive) as tar:
            tar.extractall(draft, filter="tar")
        draft.rename(directory.path)
        return True
