"""What Admission remembers of a source that may change, be slow, or be gone."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from services.admission.memory import Found, Freshness, Memory
from services.shared.errors import Unavailable

STALE_OK_S = 300.0


@dataclass
class Source:
    """Holds things by name; look-ups wait while the gate is shut."""

    things: dict[str, str] = field(default_factory=dict)
    look_ups: list[Sequence[str]] = field(default_factory=list)
    failure: Exception | None = None
    ends: float = float("inf")
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def look_up(self, keys: Sequence[str]) -> Mapping[str, Found[str] | Exception]:
        self.look_ups.append(keys)
        found: dict[str, Found[str] | Exception] = {
            key: Found(self.things[key], self.ends) for key in keys if key in self.things
        }
        if "unreadable" in keys:
            found["unreadable"] = ValueError("unreadable")
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return found


class Rig:
    def __init__(self, size: int = 100) -> None:
        self.now = 1000.0
        self.source = Source()
        self.source.gate.set()
        self.freshness = Freshness(STALE_OK_S, lambda: self.now)
        self.freshness.read(self.now)
        self.memory: Memory[str, str] = Memory(
            self.freshness, self.source.look_up, lasting=lambda thing: thing != "fleeting", size=size
        )

    async def under_way(self, number: int) -> None:
        async with asyncio.timeout(5):
            while len(self.source.look_ups) < number:  # noqa: ASYNC110 - until other tasks have run
                await asyncio.sleep(0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_many_misses_share_a_look_up_and_those_that_come_meanwhile_the_next(rig: Rig) -> None:
    rig.source.things = {"a": "1", "b": "2", "c": "3"}
    rig.source.gate.clear()
    first = [asyncio.create_task(rig.memory.get("a")) for _ in range(100)]
    await rig.under_way(1)
    later = [asyncio.create_task(rig.memory.get(key)) for key in "abcbc" * 20]
    await asyncio.sleep(0)
    rig.source.gate.set()
    assert await asyncio.gather(*first, *later) == ["1"] * 100 + ["1", "2", "3", "2", "3"] * 20
    assert [sorted(keys) for keys in rig.source.look_ups] == [["a"], ["b", "c"]]


async def test_what_is_known_is_not_looked_up_again_neither_is_what_does_not_exist(rig: Rig) -> None:
    rig.source.things = {"a": "1"}
    for _ in range(3):
        assert (await rig.memory.get("a"), await rig.memory.get("b")) == ("1", None)
    assert len(rig.source.look_ups) == 2


@pytest.mark.parametrize(
    "forget", [lambda memory: memory.forget("a"), lambda memory: memory.forget_all(lambda _: True)]
)
async def test_what_changes_while_it_is_looked_up_is_looked_up_again(
    rig: Rig, forget: Callable[[Memory[str, str]], None]
) -> None:
    rig.source.things = {"a": "old"}
    rig.source.gate.clear()
    caller = asyncio.create_task(rig.memory.get("a"))
    await rig.under_way(1)
    rig.source.things = {"a": "new"}
    forget(rig.memory)
    rig.source.gate.set()
    assert await caller == "new"
    assert await rig.memory.get("a") == "new"
    assert len(rig.source.look_ups) == 2


async def test_only_what_has_changed_is_forgotten(rig: Rig) -> None:
    rig.source.things = {"a": "1", "b": "2"}
    assert (await rig.memory.get("a"), await rig.memory.get("b"), await rig.memory.get("c")) == ("1", "2", None)
    rig.source.things = {"a": "3", "b": "4", "c": "5"}
    rig.memory.forget_all(lambda thing: thing == "1")
    assert (await rig.memory.get("a"), await rig.memory.get("b"), await rig.memory.get("c")) == ("3", "2", "5")


async def test_a_caller_that_goes_away_takes_nobody_elses_answer_along(rig: Rig) -> None:
    rig.source.things = {"a": "1"}
    rig.source.gate.clear()
    gone, stays = (asyncio.create_task(rig.memory.get("a")) for _ in range(2))
    await rig.under_way(1)
    gone.cancel()
    rig.source.gate.set()
    assert await stays == "1"
    assert len(rig.source.look_ups) == 1


async def test_an_error_is_for_those_who_asked_for_that_key(rig: Rig) -> None:
    rig.source.things = {"a": "1"}
    rig.source.gate.clear()
    waiting = asyncio.create_task(rig.memory.get("first"))
    await rig.under_way(1)
    fine, bad = asyncio.create_task(rig.memory.get("a")), asyncio.create_task(rig.memory.get("unreadable"))
    await asyncio.sleep(0)
    rig.source.gate.set()
    assert await fine == "1"
    assert await waiting is None
    with pytest.raises(ValueError, match="unreadable"):
        await bad


async def test_without_the_source_what_may_last_is_told_for_so_long_and_nothing_else(rig: Rig) -> None:
    rig.source.things = {"a": "1", "b": "fleeting"}
    for key in "abc":
        await rig.memory.get(key)
    rig.freshness.lose()
    rig.now += STALE_OK_S - 1
    assert await rig.memory.get("a") == "1"
    for key in ("b", "c", "unknown"):
        with pytest.raises(Unavailable):
            await rig.memory.get(key)
    assert len(rig.source.look_ups) == 3, "nobody waits for a source that is gone"
    rig.now += 1
    with pytest.raises(Unavailable):
        await rig.memory.get("a")


async def test_changes_that_were_not_read_for_seconds_count_as_a_lost_source(rig: Rig) -> None:
    rig.source.things = {"b": "fleeting"}
    await rig.memory.get("b")
    rig.now += 5
    with pytest.raises(Unavailable):
        await rig.memory.get("b")
    rig.freshness.read(rig.now)
    assert await rig.memory.get("b") == "fleeting"


async def test_renewed_is_all_that_was_remembered(rig: Rig) -> None:
    rig.source.things = {"a": "1", "b": "2"}
    for key in "abc":
        await rig.memory.get(key)
    rig.freshness.lose()
    rig.source.things = {"a": "3", "c": "4"}
    await rig.memory.renew()
    rig.freshness.read(rig.now)
    assert [await rig.memory.get(key) for key in "abc"] == ["3", None, "4"]
    # What did not exist is not renewed, but forgotten.
    assert rig.source.look_ups[3:] == [["a", "b"], ["c"]]


async def test_what_changes_elsewhere_while_all_is_renewed_keeps_nothing_old(rig: Rig) -> None:
    rig.source.things = {"a": "1"}
    await rig.memory.get("a")
    rig.freshness.lose()
    rig.source.things = {}
    rig.source.gate.clear()
    renewal = asyncio.create_task(rig.memory.renew())
    await rig.under_way(2)
    rig.memory.forget_all(lambda thing: thing == "another")
    rig.source.gate.set()
    await renewal
    rig.freshness.read(rig.now)
    assert await rig.memory.get("a") is None


async def test_a_look_up_from_before_a_gap_is_not_remembered(rig: Rig) -> None:
    rig.source.things = {"a": "old"}
    rig.source.gate.clear()
    caller = asyncio.create_task(rig.memory.get("a"))
    await rig.under_way(1)
    rig.freshness.lose()
    rig.source.things = {"a": "new"}
    await rig.memory.renew()
    rig.freshness.read(rig.now)
    rig.source.gate.set()
    assert await caller == "new"


async def test_what_ends_by_itself_is_looked_up_again_then(rig: Rig) -> None:
    rig.source.things, rig.source.ends = {"a": "1"}, rig.now + 1
    assert await rig.memory.get("a") == "1"
    rig.now += 1
    rig.source.things = {}
    assert await rig.memory.get("a") is None
    rig.source.things, rig.source.ends = {"b": "2"}, rig.now + 1
    assert await rig.memory.get("b") == "2"
    rig.freshness.lose()
    rig.now += 1
    with pytest.raises(Unavailable):
        await rig.memory.get("b")


async def test_the_least_recently_used_is_given_up_first() -> None:
    rig = Rig(size=3)
    rig.source.things = {key: key for key in "abcd"}
    for key in "abcad":
        assert await rig.memory.get(key) == key
    assert len(rig.source.look_ups) == 4
    for key in "acd":
        await rig.memory.get(key)
    assert len(rig.source.look_ups) == 4
    await rig.memory.get("b")
    assert len(rig.source.look_ups) == 5


async def test_whoever_asks_for_what_never_was_makes_nobodys_forgotten() -> None:
    rig = Rig(size=3)
    rig.source.things = {"a": "1"}
    await rig.memory.get("a")
    for number in range(10):
        assert await rig.memory.get(f"stranger {number}") is None
    look_ups = len(rig.source.look_ups)
    assert await rig.memory.get("a") == "1"
    assert await rig.memory.get("stranger 9") is None
    assert len(rig.source.look_ups) == look_ups
    assert await rig.memory.get("stranger 0") is None
    assert len(rig.source.look_ups) == look_ups + 1


async def test_a_failed_look_up_is_everybodys_who_waits_and_nothing_is_remembered_of_it(rig: Rig) -> None:
    rig.source.failure = Unavailable("gone")
    answers = await asyncio.gather(*(rig.memory.get("a") for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    rig.source.failure, rig.source.things = None, {"a": "1"}
    assert await rig.memory.get("a") == "1"
