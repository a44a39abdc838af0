"""What the process backend keeps of an engine on disk."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from services.shared.errors import BackendError, Unavailable
from services.shared.failpoints import reached

_TRASH_SUFFIX = ".trash"
_LOCK_PAUSE_S = 0.01


class MarkerState(StrEnum):
    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Marker:
    """Says whose the directory is, and how far its instance came.

    `CREATED`: there never was a process of this generation. `STARTING` is written before the spawn,
    `STARTED` when the process can be seen: one that can't be seen any more has then ended.
    `REMOVED`: only the volume is left.
    """

    installation: str
    generation: int
    state: MarkerState


class EngineDirectory:
    """`<root>/<engine_id>/`: the marker, the volume, the log.

    Args:
        root: holds the directories of all engines.
        engine_id: the directory's name.
    """

    def __init__(self, root: Path, engine_id: UUID) -> None:
        self.engine_id = engine_id
        self.path = root / str(engine_id)
        self.volume = self.path / "data"
        self.log = self.path / "engine.log"
        self._marker = self.path / "instance.json"
        self._trash = self.path.with_suffix(_TRASH_SUFFIX)

    @contextmanager
    def locked(self, timeout_s: float) -> Iterator[bool]:
        """Keeps out every other thread and process that changes this engine; False if there is no directory.

        The lock is on the open directory, which a child loses only by exec: whoever has the lock
        knows that no spawn is under way, even if the spawner was killed in the middle of it.

        Raises:
            Unavailable: another one kept the lock for `timeout_s` seconds.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            descriptor = None
        if descriptor is None:
            yield False
            return
        try:
            deadline = time.monotonic() + timeout_s
            while not _lock(descriptor):
                if time.monotonic() > deadline:
                    raise Unavailable("the engine is busy with another operation")
                time.sleep(_LOCK_PAUSE_S)
            yield self._is(descriptor)
        finally:
            os.close(descriptor)

    def marker(self) -> Marker | None:
        """None if there is none, or none that can be read: then nothing was ever run here."""
        try:
            content = json.loads(self._marker.read_bytes())
            return Marker(content["installation"], int(content["generation"]), MarkerState(content["state"]))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def write(self, marker: Marker) -> None:
        """Replaces the marker; a crash leaves the old or the new one."""
        draft = self._marker.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(marker)))
        draft.replace(self._marker)

    def destroy(self) -> None:
        """Removes all of it. Renamed first: half a volume never has the engine's name."""
        self.empty_trash()
        self.path.rename(self._trash)
        reached("process.trashed")
        self.empty_trash()

    def empty_trash(self) -> None:
        """Removes what `destroy` has renamed."""
        _delete(self._trash)

    def _is(self, descriptor: int) -> bool:
        """False if it was thrown away, and perhaps made anew, while we waited for the lock."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False


def engine_directories(root: Path) -> list[EngineDirectory]:
    return [EngineDirectory(root, engine_id) for path in root.iterdir() if (engine_id := _uuid(path.name))]


def empty_all_trash(root: Path) -> None:
    """Finishes what a crash in `destroy` left over."""
    for path in root.iterdir():
        if path.suffix == _TRASH_SUFFIX and _uuid(path.stem):
            _delete(path)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        raise BackendError("the engine's volume could not be removed")


def _uuid(name: str) -> UUID | None:
    try:
        engine_id = UUID(name)
    except ValueError:
        return None
    return engine_id if str(engine_id) == name else None
