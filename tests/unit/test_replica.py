"""Who notices that a replica has died, and what becomes of that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

from services.admission import replica
from services.shared.errors import Unavailable
from tests.harness import eventually


@asynccontextmanager
async def watched(directory: Path, unavailable: int = 0) -> AsyncIterator["asyncio.Queue[UUID]"]:
    """Gives who is buried, also in vain: the first times, the registry is out of reach."""
    buried: asyncio.Queue[UUID] = asyncio.Queue()

    async def bury(dead: UUID) -> None:
        buried.put_nowait(dead)
        if buried.qsize() <= unavailable:
            raise Unavailable("the registry can't be reached")

    watching = asyncio.create_task(replica.watch(directory, bury, interval_s=0.01))
    async with asyncio.timeout(10):
        yield buried
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


async def gone(directory: Path, dead: UUID) -> None:
    await asyncio.to_thread(eventually, lambda: not (directory / str(dead)).exists(), "it is forgotten")


async def test_who_dies_is_buried_once_and_the_living_are_not(tmp_path: Path) -> None:
    living, first, second = uuid4(), uuid4(), uuid4()
    with replica.alive(tmp_path, living):
        async with watched(tmp_path) as buried:
            for dying in (first, second):
                with replica.alive(tmp_path, dying):
                    pass
                assert await buried.get() == dying
                await gone(tmp_path, dying)
        assert buried.empty()
    assert replica.dead(tmp_path) == [living]


async def test_who_could_not_be_buried_is_buried_later(tmp_path: Path) -> None:
    dying = uuid4()
    with replica.alive(tmp_path, dying):
        pass
    async with watched(tmp_path, unavailable=2) as buried:
        await gone(tmp_path, dying)
    assert [buried.get_nowait() for _ in range(buried.qsize())] == [dying] * 3
