"""A clock that is set while processes run by it, and by no others: the host's stays as it is."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import psutil

from tests.integration.docker_daemon import missing

_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


HOURS = (-1, 0, 1)


class Clock:
    """Args:
    directory: for a file by which processes are told, and which all may enter.
    """

    def __init__(self, directory: Path) -> None:
        if _LIBRARY is None:
            missing("no library to set clocks: install the package faketime")
        self._file = directory / "ahead"
        self.environment = {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # What has passed since another moment is not changed by setting a clock.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.set(0)

    def step(self, chance: Random) -> None:
        """Sets it to another hour."""
        self.set(chance.choice([hours for hours in HOURS if hours != self.hours]))

    def shows(self, moment: datetime) -> bool:
        """Whether this is about what it shows now: a library that could not be loaded is no error to any process."""
        return round((moment - datetime.now(UTC)).total_seconds() / 3600, 1) == self.hours

    def set(self, hours: float) -> None:
        """From now on it is so much ahead of the host's."""
        self.hours = hours
        new = self._file.with_suffix(".new")
        new.write_text(f"{hours * 3600:+.0f}\n")
        new.chmod(0o644)
        new.rename(self._file)


@contextmanager
def clock() -> Iterator[Clock]:
    with tempfile.TemporaryDirectory(prefix="clock-") as directory:
        Path(directory).chmod(0o755)
        yield Clock(Path(directory))
    # What the library shares between processes it leaves behind when they are killed.
    for left in Path("/dev/shm").glob("*faketime_s*_*"):
        if not psutil.pid_exists(int(left.name.rpartition("_")[2])):
            left.unlink(missing_ok=True)  # Others tidy up as well.
