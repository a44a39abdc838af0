"""Blocking calls of a backend: off the event loop, bounded in number and in time."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from services.shared.errors import Unavailable

T = TypeVar("T")


class BackendThreads:
    """A pool of its own, so that a backend that hangs takes no thread from anybody else.

    Calls for one engine run one after the other, in the order in which they came. A caller that
    gives up does not end its thread: the next call for that engine begins when the thread is done,
    and finds what it made.

    While nothing is answered at all, one call at a time goes through, to learn when the backend is
    back, and its caller waits a tenth of the time; the others are refused at once.

    Args:
        size: threads, and with that calls at the same time and threads that can ever be stuck.
        timeout_s: seconds that a call may wait for its turn, and then again for its answer. The call
            itself must have limits of the same order, so that its thread ends some day.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size = size
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="backend")
        self._free = asyncio.Semaphore(size)
        self._turns: WeakValueDictionary[UUID | None, asyncio.Lock] = WeakValueDictionary()
        self._begun: dict[asyncio.Future[Any], float] = {}
        self._answered_at = time.monotonic()
        self._hangs = False

    async def run(self, call: Callable[[], T], engine_id: UUID | None = None) -> T:
        """What `call` returns or raises; calls without an engine are in turn among themselves.

        Raises:
            Unavailable: no answer in time, or none is to be expected.
        """
        if self._refuses():
            raise _no_answer()
        patience_s = self._timeout_s / 10 if self._hangs else self._timeout_s
        turn = self._turns.setdefault(engine_id, asyncio.Lock())
        try:
            async with asyncio.timeout(patience_s):
                await turn.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    turn.release()
                    raise
        except TimeoutError:
            raise _no_answer() from None

        begun = time.monotonic()
        answer = asyncio.wrap_future(self._executor.submit(call))
        self._begun[answer] = begun
        answer.add_done_callback(partial(self._ended, turn))
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            # Others were answered meanwhile: then it is this call that is slow.
            self._hangs = self._answered_at < begun
            raise _no_answer() from None

    def close(self) -> None:
        """Drops the calls that have not begun; the others go on, and nobody waits for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _refuses(self) -> bool:
        overdue = sum(begun + self._timeout_s <= time.monotonic() for begun in self._begun.values())
        return overdue == self._size or (self._hangs and len(self._begun) > overdue)

    def _ended(self, turn: asyncio.Lock, answer: asyncio.Future[Any]) -> None:
        now = time.monotonic()
        if now < self._begun.pop(answer) + self._timeout_s:
            self._answered_at = now
            self._hangs = False
        turn.release()
        self._free.release()
        if not answer.cancelled():
            answer.exception()  # Nobody may be left to ask for it.


def _no_answer() -> Unavailable:
    return Unavailable("the engine backend did not answer in time")
