"""Blocking calls that hang, and what they may hold up."""

import asyncio
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from services.provisioner.backends.threads import BackendThreads
from services.shared.errors import BackendError, Unavailable
from tests.integration.backend_rigs import until

TIMEOUT_S = 1.0
AT_ONCE_S = 0.5  # On a busy machine.


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Wait for it in a call that is to hang; ends with the test."""
    event = threading.Event()
    yield event
    event.set()


async def seconds_until_refused(threads: BackendThreads, hang: threading.Event) -> float:
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await threads.run(hang.wait, uuid4())
    return time.monotonic() - begun


async def test_answers_and_errors_come_through() -> None:
    def refuse() -> None:
        raise BackendError("no")

    threads = BackendThreads(1, TIMEOUT_S)
    assert await threads.run(lambda: 42) == 42
    with pytest.raises(BackendError):
        await threads.run(refuse)
    assert await threads.run(lambda: 42) == 42
    threads.close()


async def test_while_nothing_is_answered_one_call_waits_a_little_and_the_others_are_refused_at_once(
    hang: threading.Event,
) -> None:
    threads = BackendThreads(3, 2 * TIMEOUT_S)
    assert 2 * TIMEOUT_S <= await seconds_until_refused(threads, hang) < 2 * TIMEOUT_S + AT_ONCE_S

    waits = sorted(await asyncio.gather(*(seconds_until_refused(threads, hang) for _ in range(20))))
    assert waits[-2] < waits[-1] / 2
    assert TIMEOUT_S / 5 <= waits[-1] < TIMEOUT_S
    threads.close()


async def test_with_every_thread_stuck_calls_are_refused_at_once_and_other_pools_go_on(hang: threading.Event) -> None:
    threads = BackendThreads(4, TIMEOUT_S)
    await asyncio.gather(*(seconds_until_refused(threads, hang) for _ in range(4)))

    assert await seconds_until_refused(threads, hang) < AT_ONCE_S
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 42), AT_ONCE_S) == 42
    assert sum(thread.name.startswith("backend") for thread in threading.enumerate()) <= 4
    threads.close()


async def test_calls_are_served_again_when_the_backend_is_back(hang: threading.Event) -> None:
    threads = BackendThreads(2, TIMEOUT_S)
    await asyncio.gather(*(seconds_until_refused(threads, hang) for _ in range(2)))
    hang.set()

    async def answers() -> bool:
        try:
            return await threads.run(lambda: True)
        except Unavailable:
            return False

    await until(answers)
    assert await asyncio.gather(*(threads.run(lambda: True, uuid4()) for _ in range(10))) == [True] * 10
    threads.close()


async def test_one_slow_call_among_answered_ones_closes_nothing(hang: threading.Event) -> None:
    threads = BackendThreads(4, TIMEOUT_S)

    async def others() -> None:
        while True:
            await threads.run(lambda: time.sleep(0.1), uuid4())

    answered = asyncio.create_task(others())
    await seconds_until_refused(threads, hang)
    assert await asyncio.gather(*(threads.run(lambda: True, uuid4()) for _ in range(10))) == [True] * 10
    answered.cancel()
    threads.close()


async def test_more_calls_than_threads_wait_in_line_without_limit_on_their_number() -> None:
    threads = BackendThreads(2, 5)
    answers = await asyncio.gather(*(threads.run(lambda n=n: n, uuid4()) for n in range(200)))  # type: ignore[misc]
    assert answers == list(range(200))
    threads.close()


async def test_the_next_call_of_an_engine_begins_when_one_given_up_has_ended(hang: threading.Event) -> None:
    threads = BackendThreads(4, 5)
    engine = uuid4()
    log: list[str] = []

    def first() -> None:
        hang.wait()
        log.append("first")

    abandoned = asyncio.create_task(threads.run(first, engine))
    await asyncio.sleep(0)
    abandoned.cancel()
    second = asyncio.create_task(threads.run(lambda: log.append("second"), engine))
    # Other engines are not held up by it.
    await threads.run(lambda: log.append("other"), uuid4())
    hang.set()
    await second
    assert log == ["other", "first", "second"]
    threads.close()


async def test_a_call_given_up_in_line_never_runs(hang: threading.Event) -> None:
    threads = BackendThreads(1, 5)
    ran: list[str] = []
    holder = asyncio.create_task(threads.run(hang.wait, uuid4()))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(threads.run(lambda: ran.append("waiting"), uuid4()))
    await asyncio.sleep(0)
    waiting.cancel()
    hang.set()
    await holder
    await threads.run(lambda: None)
    assert ran == []
    threads.close()
