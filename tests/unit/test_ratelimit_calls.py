"""What calls cost the ledger: they ask together, and refused ones ask nobody."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import UUID, uuid4

import pytest

from services.admission.domain import Product
from services.admission.ratelimit import LeasedLimiter
from services.admission.ratelimit_ledger import ANSWER_S, LEASE_S, PROMISED_ANSWERS, WINDOW_S, Claim, Grant
from services.shared.errors import RateLimited, Unavailable
from tests.rate_ledger import Ledger

STALE_OK_S = 100.0
LIMIT = 10
PRODUCT = Product(uuid4(), LIMIT, 0)


class Asked:
    """A ledger of one product that keeps what it was asked, and can be out of reach."""

    def __init__(self) -> None:
        self.exchanges: list[Sequence[Claim]] = []
        self.reachable = True
        self._ledger = Ledger(
            LIMIT,
            window_s=WINDOW_S,
            stale_ok_s=STALE_OK_S,
            lease_s=LEASE_S,
            answer_s=ANSWER_S,
            promised_s=(PROMISED_ANSWERS - 2) * ANSWER_S,
        )

    async def exchange(self, claims: Sequence[Claim], spare: Sequence[UUID]) -> Mapping[UUID, Grant | None]:
        self.exchanges.append(claims)
        if not self.reachable:
            raise Unavailable("the registry can't be reached")
        now = time.monotonic()
        return {c.product_id: self._ledger.claim("mine", len(self.exchanges), c, now) for c in claims}

    async def leave(self) -> None:
        self._ledger.leave("mine", time.monotonic())


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def ticks(limiter: LeasedLimiter, clock: Clock, seconds: float) -> None:
    """So long in which nobody calls."""
    for _ in range(round(seconds / LEASE_S)):
        clock.now += LEASE_S
        await limiter.tick()


async def used_once(ledger: Asked, clock: Clock) -> LeasedLimiter:
    """A limiter that has a reserve of a product that was used once, a window ago."""
    mine = LeasedLimiter(ledger, stale_ok_s=STALE_OK_S, clock=clock)
    call = asyncio.create_task(mine.take(PRODUCT))
    await asyncio.sleep(0)
    await mine.tick()
    await call
    await ticks(mine, clock, WINDOW_S + 1)
    return mine


@asynccontextmanager
async def limiter(ledger: Asked) -> AsyncIterator[LeasedLimiter]:
    """Whose clock stands still, so that no lease ends."""
    limiter = LeasedLimiter(ledger, stale_ok_s=STALE_OK_S, clock=lambda: 100.0)
    await limiter.tick()
    ledger.exchanges.clear()
    running = asyncio.create_task(limiter.run())
    yield limiter
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_calls_that_come_at_one_time_ask_once() -> None:
    ledger = Asked()
    async with limiter(ledger) as mine:
        await asyncio.gather(*(mine.take(PRODUCT) for _ in range(LIMIT)))
    assert [claim.need for [claim] in ledger.exchanges] == [LIMIT]


async def test_calls_that_are_refused_ask_nobody_and_know_when_a_token_is_free() -> None:
    ledger = Asked()
    async with limiter(ledger) as mine:
        answers = await asyncio.gather(*(mine.take(PRODUCT) for _ in range(LIMIT + 1)), return_exceptions=True)
        assert [type(answer) for answer in answers if answer is not None] == [RateLimited]
        for _ in range(100):
            with pytest.raises(RateLimited) as refused:
                mine.take_now(PRODUCT)
            assert refused.value.retry_after_s == pytest.approx(WINDOW_S, abs=WINDOW_S / 60)
    assert len(ledger.exchanges) == 1


async def test_a_product_without_a_limit_has_nothing_to_do_with_the_ledger() -> None:
    ledger = Asked()
    async with limiter(ledger) as mine:
        free = Product(uuid4(), None, 0)
        assert mine.take_now(free)
        await mine.take(free)
    assert ledger.exchanges == []


async def test_calls_do_not_wait_for_a_ledger_that_is_out_of_reach() -> None:
    ledger = Asked()
    async with limiter(ledger) as mine:
        ledger.reachable = False
        with pytest.raises(Unavailable):
            await mine.take(PRODUCT)
        for _ in range(10):
            with pytest.raises(Unavailable):
                await mine.take(PRODUCT)
        assert len(ledger.exchanges) == 1


async def test_what_is_not_needed_is_given_back_at_the_end() -> None:
    ledger = Asked()
    async with limiter(ledger) as mine:
        await mine.take(PRODUCT)
    await mine.close()
    assert [(claim.bound, claim.need, claim.promise) for claim in ledger.exchanges[-1]] == [(1, 1, 0)]


async def test_a_product_that_was_idle_for_long_goes_on_without_the_ledger() -> None:
    ledger, clock = Asked(), Clock()
    mine = await used_once(ledger, clock)
    await ticks(mine, clock, 1.5 * STALE_OK_S)
    ledger.reachable = False
    await ticks(mine, clock, 0.8 * STALE_OK_S)
    assert mine.take_now(PRODUCT)


async def test_a_replica_without_calls_rests() -> None:
    ledger, clock = Asked(), Clock()
    mine = await used_once(ledger, clock)
    before = len(ledger.exchanges)
    await ticks(mine, clock, 30)
    exchanges = ledger.exchanges[before:]
    # Once in 0.9 s, to hear whether others are short; and a claim once in 3.3 s.
    assert 20 < len(exchanges) < 45
    assert 8 <= sum(bool(claims) for claims in exchanges) <= 10
