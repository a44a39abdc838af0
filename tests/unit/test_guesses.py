"""Wrong keys, by address: what they may cost, and that they take nothing from those with good ones."""

import asyncio
from contextlib import suppress

import pytest

from services.shared.errors import RateLimited
from services.shared.guesses import Guesses

AT_ONCE, PER_S, WAITING = 1000, 100, 200


class Rig:
    """Guesses on a clock that the test turns, and whose pauses it ends."""

    def __init__(self) -> None:
        self.now = 0.0
        self.paused = 0
        self.go_on = asyncio.Event()
        self.guesses = Guesses(lambda: self.now, self._pause)

    async def _pause(self, seconds: float) -> None:
        assert seconds == 1
        self.paused += 1
        await self.go_on.wait()

    def wrong(self, address: str, times: int = 1) -> int:
        """How many of so many wrong keys were only called wrong."""
        taken = 0
        for _ in range(times):
            with suppress(RateLimited):
                self.guesses.wrong(address)
                taken += 1
        return taken


def test_an_address_has_a_thousand_at_once_and_then_a_hundred_a_second() -> None:
    rig = Rig()
    assert rig.wrong("192.0.2.1", AT_ONCE + 50) == AT_ONCE
    rig.now += 0.5
    assert rig.wrong("192.0.2.1", PER_S) == PER_S // 2
    rig.now += 3600
    assert rig.wrong("192.0.2.1", AT_ONCE + 50) == AT_ONCE


def test_addresses_do_not_pay_for_each_other_but_those_of_one_network_of_version_6_do() -> None:
    rig = Rig()
    assert rig.wrong("192.0.2.1", AT_ONCE) == AT_ONCE
    assert rig.wrong("192.0.2.2") == 1
    assert rig.wrong("2001:db8::1", AT_ONCE) == AT_ONCE
    assert rig.wrong("2001:db8::ffff:ffff:ffff:ffff") == 0
    assert rig.wrong("2001:db8:0:1::1") == 1
    assert rig.wrong("::ffff:192.0.2.1") == 0
    assert rig.wrong("::ffff:192.0.2.3") == 1


def test_what_is_no_address_is_all_one() -> None:
    rig = Rig()
    assert rig.wrong("anything", AT_ONCE) == AT_ONCE
    assert rig.wrong("something else") == 0


async def test_over_the_limit_who_asks_waits_and_is_looked_up_then() -> None:
    rig = Rig()
    await rig.guesses.turn("192.0.2.1")
    rig.wrong("192.0.2.1", AT_ONCE)
    asked = asyncio.create_task(rig.guesses.turn("192.0.2.1"))
    await asyncio.sleep(0)
    assert (rig.paused, asked.done()) == (1, False)
    await rig.guesses.turn("192.0.2.2")
    rig.go_on.set()
    await asked
    with pytest.raises(RateLimited) as refused:
        rig.guesses.wrong("192.0.2.1")
    assert refused.value.retry_after_s == 1


async def test_a_flood_looked_up_at_one_time_leaves_no_debt() -> None:
    rig = Rig()
    rig.wrong("192.0.2.1", AT_ONCE - 1)
    # All of them may be looked up before the first is known to be wrong.
    await asyncio.gather(*(rig.guesses.turn("192.0.2.1") for _ in range(500)))
    assert rig.wrong("192.0.2.1", 500) == 1
    rig.now += 1 / PER_S
    await rig.guesses.turn("192.0.2.1")
    assert rig.paused == 0


async def test_so_many_wait_and_no_more() -> None:
    rig = Rig()
    rig.wrong("192.0.2.1", AT_ONCE)
    waiting = [asyncio.create_task(rig.guesses.turn("192.0.2.1")) for _ in range(WAITING)]
    while rig.paused < WAITING:  # noqa: ASYNC110 - they begin by themselves
        await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await rig.guesses.turn("192.0.2.1")
    assert rig.paused == WAITING
    # One who leaves makes room.
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    late = asyncio.create_task(rig.guesses.turn("192.0.2.1"))
    await asyncio.sleep(0)
    assert rig.paused == WAITING + 1
    rig.go_on.set()
    await asyncio.gather(*waiting[1:], late)


def test_of_very_many_addresses_the_first_are_forgotten() -> None:
    rig = Rig()
    rig.wrong("10.0.0.1", AT_ONCE)
    for number in range(10_000):
        rig.wrong(f"10.{number >> 8}.{number & 255}.2")
    assert rig.wrong("10.0.0.1") == 1
