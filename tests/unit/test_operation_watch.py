"""Those who wait for an operation learn of its end, or that it can't go on."""

import asyncio
from collections.abc import Collection
from uuid import UUID, uuid4

import pytest

from services.provisioner.domain.operation import Settled
from services.provisioner.loops import operation_watch
from services.provisioner.loops.operation_watch import OperationWatch
from services.shared.errors import Unavailable


class Lost:
    """A registry that can't be reached."""

    async def settled(self, operation_ids: Collection[UUID]) -> list[Settled]:
        raise Unavailable("the registry can't be reached")


async def waiting(watch: OperationWatch, operation_id: UUID) -> "list[asyncio.Task[Settled]]":
    tasks = [asyncio.create_task(watch.wait(operation_id, 60)) for _ in range(2)]
    await asyncio.sleep(0)
    return tasks


async def test_of_an_operation_that_is_delayed_all_who_wait_are_told_and_no_others() -> None:
    watch, delayed, other = OperationWatch(Lost()), uuid4(), uuid4()
    told, untold = await waiting(watch, delayed), await waiting(watch, other)
    watch.delay(delayed, Unavailable("Docker hangs"))
    assert [str(error) for error in await asyncio.gather(*told, return_exceptions=True)] == ["Docker hangs"] * 2
    assert not any(task.done() for task in untold)
    for task in untold:
        task.cancel()


async def test_who_waits_is_told_once_the_registry_was_lost_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_watch, "PATIENCE_S", 0.0)
    watch = OperationWatch(Lost())
    running = asyncio.create_task(watch.run())
    for task in await waiting(watch, uuid4()):
        with pytest.raises(Unavailable):
            await task
    running.cancel()
