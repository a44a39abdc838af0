"""Bounded memory of what was looked up, and how long it counts.

What is remembered counts as long as somebody vouches that it has not changed. Without anybody
who can, nothing new can be learned, and only that goes on counting which may outlast the source,
for a limited time.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.shared.errors import Unavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# How long one reading of changes vouches for what is remembered, in seconds.
_VOUCHED_S = 4.0
# Who has read no changes for this long starts anew; they are kept for longer.
_LONGEST_GAP_S = 60.0
_LOOK_UP_S = 2.0
_MAX_BATCH = 500


class Freshness:
    """Whether what is remembered still counts.

    Args:
        stale_ok_s: how long to go on without the source, in seconds.
        clock: monotonic, in seconds.
    """

    def __init__(self, stale_ok_s: float, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._stale_ok_s = stale_ok_s
        self._read_at = float("-inf")
        self._lost = True

    def vouches(self) -> bool:
        """Whether what is remembered is true."""
        return not self._lost and self.clock() - self._read_at < _VOUCHED_S

    def stale_ok(self) -> bool:
        """Whether what was true when changes were last read may still be told."""
        return self.clock() - self._read_at < self._stale_ok_s

    def age_s(self) -> float:
        """Seconds since changes were last read, or before which all was learned anew."""
        return self.clock() - self._read_at

    def gap(self) -> bool:
        """Whether changes may have been missed since they were last read."""
        return self._lost or self.clock() - self._read_at > _LONGEST_GAP_S

    def read(self, began: float) -> None:
        """All is forgotten or renewed that had changed before `began`, a moment on the clock."""
        self._lost = False
        self._read_at = began

    def lose(self) -> None:
        """The source can't be reached."""
        self._lost = True


@dataclass(frozen=True, slots=True)
class Found(Generic[V]):
    """What a look-up has found; of itself it counts `until` a moment on the clock."""

    value: V
    until: float = float("inf")


@dataclass(slots=True, eq=False)
class _LookUp(Generic[K]):
    """One that is under way; of what has changed since it began its answer may not know."""

    keys: Sequence[K]
    outdated: set[K] = field(default_factory=set)


class Memory(Generic[K, V]):
    """Remembers what exists under a key, and what does not. The least recently used is given up first,
    of each by itself: whoever asks for what never was makes nobody's forgotten.

    Many may miss the same or different keys at once: one look-up is under way at a time, and
    what is missed meanwhile shares the next.

    Args:
        freshness: says whether what is remembered still counts.
        look_up: finds several; what it leaves out does not exist, an error is for those who asked for that key.
        lasting: whether a thing may be told of without the source.
        size: most things to remember, and so many again that do not exist.
    """

    def __init__(
        self,
        freshness: Freshness,
        look_up: Callable[[Sequence[K]], Awaitable[Mapping[K, Found[V] | Exception]]],
        *,
        lasting: Callable[[V], bool],
        size: int,
    ) -> None:
        self._freshness = freshness
        self._look_up = look_up
        self._lasting = lasting
        self._size = size
        self._remembered: OrderedDict[K, Found[V]] = OrderedDict()
        self._absent: OrderedDict[K, None] = OrderedDict()
        self._missed: dict[K, asyncio.Future[None]] = {}
        self._under_way: list[_LookUp[K]] = []
        self._learner: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many things are remembered, and how many that do not exist."""
        return len(self._remembered) + len(self._absent)

    def __contains__(self, key: K) -> bool:
        """Whether something is remembered under the key, true or not."""
        return key in self._remembered

    async def get(self, key: K) -> V | None:
        """What exists under the key. Nothing else runs between the last look and the return.

        Raises:
            Unavailable: nobody knows now.
        """
        while True:
            known = self._remembered.get(key)
            if known is not None and self._counts(known):
                self._remembered.move_to_end(key)
                return known.value
            if key in self._absent and self._freshness.vouches():
                self._absent.move_to_end(key)
                return None
            await self._learn(key)

    def forget(self, key: K) -> None:
        """What is under the key has changed."""
        self._drop(key)
        for look_up in self._under_way:
            look_up.outdated.add(key)

    def forget_all(self, changed: Callable[[V], bool]) -> None:
        """All has changed for which this holds, and what did not exist may; takes a look at each."""
        for key in [key for key, found in self._remembered.items() if changed(found.value)]:
            del self._remembered[key]
        self._absent.clear()
        for look_up in self._under_way:
            look_up.outdated.update(look_up.keys)

    async def renew(self) -> None:
        """Looks up again what is remembered. What the source now knows is remembered when this returns.

        Raises:
            Unavailable: the source can't be reached; what is remembered is old in part.
        """
        for look_up in self._under_way:
            look_up.outdated.update(look_up.keys)
        self._absent.clear()
        keys = list(self._remembered)
        for start in range(0, len(keys), _MAX_BATCH):
            batch = keys[start : start + _MAX_BATCH]
            await self._looked_up(batch)

    def _counts(self, known: Found[V]) -> bool:
        fresh = self._freshness
        if fresh.clock() >= known.until:
            return False
        return fresh.vouches() or (self._lasting(known.value) and fresh.stale_ok())

    async def _learn(self, key: K) -> None:
        """Returns once the key was looked up, be it in vain because it has changed meanwhile."""
        if not self._freshness.vouches():
            # At once: an outage is no time to wait.
            raise Unavailable("the registry can't be reached")
        missed = self._missed.get(key)
        if missed is None:
            missed = self._missed[key] = asyncio.get_running_loop().create_future()
            if self._learner is None:
                self._learner = asyncio.create_task(self._learn_missed())
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                # Others wait for it, too.
                await asyncio.shield(missed)
        except TimeoutError as error:
            raise Unavailable("the registry did not answer in time") from error

    async def _learn_missed(self) -> None:
        try:
            while self._missed:
                keys = list(self._missed)[:_MAX_BATCH]
                found: Mapping[K, Found[V] | Exception | None]
                try:
                    found = await self._looked_up(keys)
                except Exception as error:  # noqa: BLE001 - raised where it is waited for
                    found = dict.fromkeys(keys, error)
                for key in keys:
                    one = found[key]
                    if isinstance(one, Exception):
                        self._missed.pop(key).set_exception(one)
                    else:
                        self._missed.pop(key).set_result(None)
        finally:
            self._learner = None

    async def _looked_up(self, keys: Sequence[K]) -> Mapping[K, Found[V] | Exception | None]:
        """Looks keys up and remembers what it finds; what has changed meanwhile is left to the next."""
        look_up = _LookUp(keys)
        self._under_way.append(look_up)
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                answer = await self._look_up(keys)
        except TimeoutError as error:
            raise Unavailable("the registry did not answer in time") from error
        finally:
            self._under_way.remove(look_up)
        found = {key: answer.get(key) for key in keys}
        for key, one in found.items():
            # What was known before the look-up is out of date as well.
            self._drop(key)
            if key in look_up.outdated:
                continue
            if one is None:
                self._absent[key] = None
            elif isinstance(one, Found):
                self._remembered[key] = one
        for memory in (self._absent, self._remembered):
            while len(memory) > self._size:
                memory.popitem(last=False)
        return found

    def _drop(self, key: K) -> None:
        self._remembered.pop(key, None)
        self._absent.pop(key, None)
