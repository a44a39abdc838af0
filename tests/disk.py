"""Small disks of the tests' own, to be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.integration.docker_daemon import missing


def make_disk(directory: Path, megabytes: int) -> None:
    """From here on the directory is a disk of that size."""
    if os.geteuid() != 0:
        missing("only root makes disks")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", directory], check=True)


@contextmanager
def disk(directory: Path, megabytes: int) -> Iterator[None]:
    """Within the block it is one."""
    make_disk(directory, megabytes)
    try:
        yield
    finally:
        # What was killed on it may not have ended yet.
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextmanager
def filled(directory: Path, *, but: int = 0) -> Iterator[None]:
    """Within the block so many bytes are free on the directory's disk."""
    filler = directory / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while (free := os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize) > but or not but:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(free - but, 4096))
    try:
        yield
    finally:
        filler.unlink()
