"""Room for engines' data."""

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)


async def free_bytes(directories: Iterable[Path]) -> int | None:
    """What is left on the fullest of their file systems, in bytes; None if none of them can be seen.

    Not by the backend's threads: an answer here would say that the backend itself answers.
    """
    return await asyncio.to_thread(_free_bytes, directories)


def warn_of_unseen(directories: Iterable[Path]) -> None:
    """Says in the log which of their file systems nobody watches."""
    for directory in directories:
        try:
            os.statvfs(directory)
        except OSError as error:
            log.warning("disk_not_seen", directory=str(directory), reason=error.strerror)


def _free_bytes(directories: Iterable[Path]) -> int | None:
    found = []
    for directory in directories:
        with suppress(OSError):
            status = os.statvfs(directory)
            found.append(status.f_bavail * status.f_frsize)
    return min(found, default=None)
