"""Which replicas of this machine are alive: a file for each, locked for as long as its process lives.

The lock goes with the process, however that ends. So whoever gets the lock of a replica knows for
certain that it is dead, and need not wait until it must be.
"""

import asyncio
import fcntl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

from services.shared.errors import Unavailable

INTERVAL_S = 0.5


@contextmanager
def alive(directory: Path, replica_id: UUID) -> Iterator[None]:
    """Marks this process as alive within the block, and as dead once it has ended.

    Args:
        directory: shared by the replicas of this machine, and by no others.
        replica_id: random per start of a process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Under its own name only once it is locked: nobody finds it without.
    unlocked = directory / f"{replica_id}.new"
    with unlocked.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unlocked.rename(directory / str(replica_id))
        yield


def dead(directory: Path) -> list[UUID]:
    """The replicas of this machine that have ended, orderly or not, and were not forgotten since."""
    ended = []
    for path in directory.iterdir():
        try:
            replica_id = UUID(path.name)
        except ValueError:
            continue
        # It is locked by the living, and gone if another has just forgotten it.
        with suppress(BlockingIOError, FileNotFoundError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended.append(replica_id)
    return ended


def forget(directory: Path, replica_id: UUID) -> None:
    """Nobody needs to know any more that this replica has ended."""
    (directory / str(replica_id)).unlink(missing_ok=True)


async def bury_dead(directory: Path, bury: Callable[[UUID], Awaitable[None]]) -> None:
    """Buries those that have ended, and forgets them.

    Raises:
        Unavailable: they have to be buried another time.
    """
    for replica_id in dead(directory):
        await bury(replica_id)
        forget(directory, replica_id)


async def watch(directory: Path, bury: Callable[[UUID], Awaitable[None]], *, interval_s: float = INTERVAL_S) -> None:
    """Buries whoever dies, soon after: what is held for the dead, nobody else can use.

    Args:
        directory: of the replicas.
        bury: told of a dead one, perhaps more than once; `Unavailable` if it has to be told again.
        interval_s: seconds between two looks.
    """
    while True:
        await asyncio.sleep(interval_s)
        with suppress(Unavailable):
            await bury_dead(directory, bury)
