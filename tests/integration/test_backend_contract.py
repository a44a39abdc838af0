"""The contract of `Backend`, kept by every backend."""

import asyncio
import socket
import time
from dataclasses import replace
from uuid import uuid4

import pytest

from services.provisioner.backends.base import Instance, InstanceState, PortTaken
from services.shared.errors import BackendError, Unavailable
from tests.integration.backend_rigs import Rig, answers, free_port, spec_for, until


async def test_an_engine_lives_through_create_start_stop_start_remove(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)

    assert await backend.inspect(spec.engine_id) is None
    await backend.create(spec)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.CREATED)
    assert not await answers(spec.port)
    await backend.start(spec)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
    await until(lambda: answers(spec.port))
    await backend.stop(spec.engine_id, grace_s=10)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)
    assert not await answers(spec.port)
    await backend.start(spec)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
    await until(lambda: answers(spec.port))
    await backend.remove(spec.engine_id, volume=True)
    assert await backend.inspect(spec.engine_id) is None
    assert rig.leftovers() == 0


async def test_every_step_may_be_repeated(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)

    await backend.create(spec)
    await backend.create(spec)
    await backend.start(spec)
    first = rig.incarnation(spec.engine_id)
    await backend.start(spec)
    await backend.create(spec)
    assert rig.incarnation(spec.engine_id) == first
    await backend.stop(spec.engine_id, grace_s=10)
    await backend.stop(spec.engine_id, grace_s=10)
    await backend.remove(spec.engine_id, volume=False)
    await backend.remove(spec.engine_id, volume=False)
    await backend.remove(spec.engine_id, volume=True)
    await backend.remove(spec.engine_id, volume=True)
    assert rig.leftovers() == 0


async def test_a_new_generation_replaces_the_instance_and_keeps_the_volume(rig: Rig) -> None:
    backend = await rig.backend()
    old = spec_for(rig)
    await backend.create(old)
    await backend.start(old)
    volume = rig.volume(old.engine_id)
    assert volume is not None
    (volume / "brain.sqlite").write_text("memories")
    first = rig.incarnation(old.engine_id)

    new = replace(old, generation=2)
    await backend.create(new)
    assert await backend.inspect(new.engine_id) == Instance(new.engine_id, 2, InstanceState.CREATED)
    await backend.start(new)
    assert await backend.inspect(new.engine_id) == Instance(new.engine_id, 2, InstanceState.RUNNING)
    assert rig.incarnation(new.engine_id) != first
    assert rig.running(new.engine_id) == 1
    assert (volume / "brain.sqlite").read_text() == "memories"


async def test_removal_without_the_volume_keeps_it_for_the_next_instance(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    volume = rig.volume(spec.engine_id)
    assert volume is not None
    (volume / "brain.sqlite").write_text("memories")

    await backend.remove(spec.engine_id, volume=False)
    assert await backend.inspect(spec.engine_id) is None
    assert await backend.list() == []
    await backend.create(spec)
    assert rig.volume(spec.engine_id) == volume
    assert (volume / "brain.sqlite").read_text() == "memories"


async def test_a_worker_of_an_older_generation_is_refused(rig: Rig) -> None:
    backend = await rig.backend()
    new = spec_for(rig, generation=2)
    await backend.create(new)
    await backend.start(new)
    first = rig.incarnation(new.engine_id)

    old = replace(new, generation=1)
    with pytest.raises(BackendError):
        await backend.create(old)
    with pytest.raises(BackendError):
        await backend.start(old)
    assert rig.incarnation(new.engine_id) == first


async def test_start_without_an_instance_says_that_it_is_gone(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)

    with pytest.raises(Unavailable):
        await backend.start(spec)
    await backend.create(spec)
    with pytest.raises(Unavailable):
        await backend.start(replace(spec, generation=2))
    assert rig.running(spec.engine_id) == 0


async def test_an_image_that_is_not_there_is_refused_and_leaves_nothing(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig, image=rig.missing)

    with pytest.raises(BackendError, match="image"):
        await backend.create(spec)
    assert await backend.inspect(spec.engine_id) is None
    assert rig.leftovers() == 0


async def test_the_list_has_every_state_and_only_the_own_installation(rig: Rig) -> None:
    backend = await rig.backend()
    created, running, frozen, exited = (spec_for(rig) for _ in range(4))
    for spec in (created, running, frozen, exited):
        await backend.create(spec)
    for spec in (running, frozen, exited):
        await backend.start(spec)
    rig.freeze(frozen.engine_id)
    await backend.stop(exited.engine_id, grace_s=10)
    other = await rig.backend(uuid4().hex)

    assert {instance.engine_id: instance.state for instance in await backend.list()} == {
        created.engine_id: InstanceState.CREATED,
        running.engine_id: InstanceState.RUNNING,
        frozen.engine_id: InstanceState.FROZEN,
        exited.engine_id: InstanceState.EXITED,
    }
    assert await other.list() == []


async def test_another_installation_sees_and_touches_nothing(rig: Rig) -> None:
    backend, other = await rig.backend(), await rig.backend(uuid4().hex)
    spec = spec_for(rig)
    await backend.create(spec)
    await backend.start(spec)
    first = rig.incarnation(spec.engine_id)

    assert await other.inspect(spec.engine_id) is None
    with pytest.raises(BackendError, match="another installation"):
        await other.create(replace(spec, generation=2))
    with pytest.raises(Unavailable):
        await other.start(spec)
    await other.stop(spec.engine_id, grace_s=0)
    await other.remove(spec.engine_id, volume=True)
    assert rig.incarnation(spec.engine_id) == first
    assert rig.volume(spec.engine_id) is not None
    await backend.remove(spec.engine_id, volume=False)
    await other.remove(spec.engine_id, volume=True)
    assert rig.volume(spec.engine_id) is not None


async def test_a_taken_port_is_refused_and_leaves_only_the_volume(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    with socket.create_server(("127.0.0.1", spec.port)), pytest.raises(PortTaken):
        await backend.start(spec)
    assert await backend.inspect(spec.engine_id) is None
    assert rig.volume(spec.engine_id) is not None

    # The next attempt, on another port, and later the refused port itself, are not in the way.
    for port in (free_port(), spec.port):
        again = replace(spec, port=port)
        await backend.create(again)
        await backend.start(again)
        await until(lambda port=port: answers(port))  # type: ignore[misc]
        await backend.remove(again.engine_id, volume=False)


async def test_the_port_of_another_engine_is_taken(rig: Rig) -> None:
    backend = await rig.backend()
    first = spec_for(rig)
    second = spec_for(rig, port=first.port)
    for spec in (first, second):
        await backend.create(spec)
    await backend.start(first)
    await until(lambda: answers(first.port))

    with pytest.raises(PortTaken):
        await backend.start(second)
    assert await backend.inspect(second.engine_id) is None
    assert await backend.inspect(first.engine_id) == Instance(first.engine_id, 1, InstanceState.RUNNING)


async def test_a_port_is_free_again_when_its_engine_is_stopped(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    for _ in range(5):
        await backend.start(spec)
        await until(lambda: answers(spec.port))
        await backend.stop(spec.engine_id, grace_s=10)


async def test_a_second_backend_adopts_what_the_first_has_made(rig: Rig) -> None:
    first, second = await rig.backend(), await rig.backend()
    spec = spec_for(rig)
    await first.create(spec)
    await first.start(spec)
    life = rig.incarnation(spec.engine_id)

    assert await second.list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]
    await second.create(spec)
    await second.start(spec)
    assert rig.incarnation(spec.engine_id) == life
    await second.stop(spec.engine_id, grace_s=10)
    assert await first.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)
    await first.start(spec)
    assert await second.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
    await second.remove(spec.engine_id, volume=True)
    assert await first.inspect(spec.engine_id) is None
    assert rig.leftovers() == 0


async def test_start_thaws_a_frozen_engine(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    await backend.start(spec)
    life = rig.incarnation(spec.engine_id)

    rig.freeze(spec.engine_id)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.FROZEN)
    await backend.create(spec)
    await backend.start(spec)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
    assert rig.incarnation(spec.engine_id) == life


async def test_thaw_lets_an_engine_go_on_whoever_froze_it_and_says_what_there_is(rig: Rig) -> None:
    first, second = await rig.backend(), await rig.backend()
    spec = spec_for(rig)
    running = Instance(spec.engine_id, 1, InstanceState.RUNNING)
    assert await first.thaw(spec.engine_id) is None
    await first.create(spec)
    assert await first.thaw(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.CREATED)
    await first.start(spec)
    life = rig.incarnation(spec.engine_id)
    assert await first.thaw(spec.engine_id) == running
    for freezes, thaws in ((first, first), (first, second), (second, first)):
        await freezes.freeze(spec.engine_id)
        assert await thaws.thaw(spec.engine_id) == running
        assert await thaws.inspect(spec.engine_id) == running
    assert rig.incarnation(spec.engine_id) == life

    # What the first has frozen last is another instance by now.
    await second.remove(spec.engine_id, volume=False)
    assert await first.thaw(spec.engine_id) is None
    await second.create(spec)
    await second.start(spec)
    await second.freeze(spec.engine_id)
    assert await first.thaw(spec.engine_id) == running


@pytest.mark.parametrize("frozen", [False, True])
async def test_stop_lets_an_engine_end_by_itself(rig: Rig, frozen: bool) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    if frozen:
        rig.freeze(spec.engine_id)

    begun = time.monotonic()
    await backend.stop(spec.engine_id, grace_s=30)
    assert time.monotonic() - begun < 10
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)


async def test_stop_kills_an_engine_that_ignores_it(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig, image=rig.deaf)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))

    begun = time.monotonic()
    await backend.stop(spec.engine_id, grace_s=0.5)
    assert time.monotonic() - begun >= 0.5
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)
    assert rig.running(spec.engine_id) == 0


async def test_stopping_engines_hold_up_nobody(rig: Rig) -> None:
    backend = await rig.backend()
    deaf = [spec_for(rig, image=rig.deaf) for _ in range(9)]
    other = spec_for(rig)
    for spec in deaf:
        await backend.create(spec)
    await asyncio.gather(*(backend.start(spec) for spec in deaf))
    await until(lambda: _all_answer([spec.port for spec in deaf]))

    stops = [asyncio.create_task(backend.stop(spec.engine_id, grace_s=60)) for spec in deaf]
    await asyncio.sleep(0)
    await asyncio.wait_for(backend.create(other), 10)
    assert not any(stop.done() for stop in stops)
    for stop in stops:
        stop.cancel()
    await asyncio.gather(*stops, return_exceptions=True)


@pytest.mark.parametrize("frozen", [False, True])
async def test_removal_takes_a_running_or_frozen_engine(rig: Rig, frozen: bool) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    await backend.create(spec)
    await backend.start(spec)
    if frozen:
        rig.freeze(spec.engine_id)

    await backend.remove(spec.engine_id, volume=True)
    assert rig.leftovers() == 0


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 10, 30, 100, 300])
async def test_calls_given_up_at_any_moment_leave_exactly_one_engine(rig: Rig, delay_ms: int) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)

    async def boot() -> None:
        await backend.create(spec)
        await backend.start(spec)

    for _ in range(3):
        attempt = asyncio.create_task(boot())
        await asyncio.wait([attempt], timeout=delay_ms / 1000)
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
    await boot()
    assert await backend.list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]
    assert rig.running(spec.engine_id) == 1


async def test_a_removal_after_a_call_given_up_leaves_nothing(rig: Rig) -> None:
    backend = await rig.backend()
    for delay_ms in (0, 1, 2, 5, 10, 20, 50):
        spec = spec_for(rig)
        attempt = asyncio.create_task(backend.create(spec))
        await asyncio.wait([attempt], timeout=delay_ms / 1000)
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        await backend.remove(spec.engine_id, volume=True)
    assert rig.leftovers() == 0


async def test_concurrent_boots_of_one_engine_make_one(rig: Rig) -> None:
    backends = [await rig.backend() for _ in range(4)]
    spec = spec_for(rig)

    async def boot(index: int) -> None:
        await backends[index % 4].create(spec)
        await backends[index % 4].start(spec)

    await asyncio.gather(*(boot(index) for index in range(8)))
    assert await backends[0].list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]
    assert rig.running(spec.engine_id) == 1


async def test_of_many_engines_that_want_one_port_one_gets_it(rig: Rig) -> None:
    backend = await rig.backend()
    port = free_port()
    specs = [spec_for(rig, port=port) for _ in range(6)]
    for spec in specs:
        await backend.create(spec)

    await asyncio.gather(*(backend.start(spec) for spec in specs), return_exceptions=True)

    async def one_is_left() -> bool:
        return sum(rig.running(spec.engine_id) for spec in specs) == 1

    await until(one_is_left)
    await until(lambda: answers(port))


async def _all_answer(ports: list[int]) -> bool:
    return all([await answers(port) for port in ports])


async def test_only_an_engine_that_runs_is_current(rig: Rig) -> None:
    backend = await rig.backend()
    spec = spec_for(rig)
    assert not await backend.is_current(spec.engine_id, spec.image)
    await backend.create(spec)
    assert not await backend.is_current(spec.engine_id, spec.image)
    await backend.start(spec)
    assert await backend.is_current(spec.engine_id, spec.image)
    await backend.freeze(spec.engine_id)
    assert not await backend.is_current(spec.engine_id, spec.image)
    await backend.thaw(spec.engine_id)
    assert await backend.is_current(spec.engine_id, spec.image)
    await backend.stop(spec.engine_id, grace_s=10)
    assert not await backend.is_current(spec.engine_id, spec.image)
