"""Loops that one process runs at a time: who leads, and what a process that stalled past its lease can still do."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest

from services.provisioner.domain.operation import LeaseLost
from services.provisioner.store.loop_leases import LoopLease
from services.shared.loops import LoopEnded
from services.shared.postgres import Database
from tests.harness import eventually

LONG_S = 60.0


class Contest:
    """Leases of one loop, each of a process of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.runs: list[str] = []

    def lease(self, lease_s: float = LONG_S) -> LoopLease:
        return LoopLease(self.database, "loop", uuid4(), lease_s)

    async def query(self, sql: Any) -> list[tuple[Any, ...]]:
        async with self.database.connection() as connection:
            cursor = await connection.execute(sql)
            return [tuple(row.values()) for row in await cursor.fetchall()] if cursor.description else []

    async def run_out(self) -> None:
        """As if nobody had renewed it."""
        await self.query("UPDATE loop_leases SET lease_until = clock_timestamp()")

    def leading(self, lease: LoopLease, name: str) -> asyncio.Task[None]:
        """Leads with a loop that notes that it runs."""

        async def loop() -> None:
            self.runs.append(name)
            await asyncio.Event().wait()

        return asyncio.create_task(lease.lead(loop))

    async def until(self, *runs: str) -> None:
        await asyncio.to_thread(eventually, lambda: self.runs == list(runs), "it runs")

    async def until_there_is(self, what: str) -> None:
        async with asyncio.timeout(10):
            while not await self.query(f"SELECT 1 {what}"):  # noqa: ASYNC110 - it happens in PostgreSQL
                await asyncio.sleep(0.01)


@pytest.fixture
def contest(database: Database) -> Contest:
    return Contest(database)


async def ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_of_all_who_want_a_lease_one_has_it(contest: Contest) -> None:
    leases = [contest.lease() for _ in range(16)]
    terms = await asyncio.gather(*(lease.hold() for lease in leases))
    assert sorted(terms, key=lambda term: term is None) == [1, *[None] * 15]
    assert await leases[terms.index(1)].hold() == 1
    assert await LoopLease(contest.database, "another loop", uuid4(), LONG_S).hold() == 1


async def test_a_lease_changes_hands_when_released_or_run_out_and_its_term_grows(contest: Contest) -> None:
    first, second = contest.lease(), contest.lease()
    assert await first.hold() == 1
    await second.release()
    assert await second.hold() is None
    await first.release()
    assert await second.hold() == 2
    assert await first.hold() is None
    await contest.run_out()
    assert await second.hold() == 2
    await contest.run_out()
    assert await first.hold() == 3


async def test_one_leads_until_it_ends_and_the_next_takes_over_at_once(contest: Contest) -> None:
    first = contest.leading(contest.lease(lease_s=0.3), "first")
    await contest.until("first")
    second = contest.leading(contest.lease(lease_s=0.3), "second")
    await asyncio.wait([second], timeout=1)  # More than three leases: renewed, it does not run out.
    assert contest.runs == ["first"]
    await ended(first)
    await contest.until("first", "second")
    await ended(second)
    assert await contest.query("SELECT lease_until < clock_timestamp(), term FROM loop_leases") == [(True, 2)]


async def test_a_loop_that_has_lost_its_lease_ends_and_begins_anew_with_the_next_term(contest: Contest) -> None:
    lease, other = contest.lease(lease_s=0.3), contest.lease()
    leading = contest.leading(lease, "run")
    await contest.until("run")
    # Another leads and has ended before this one notices: the lease is to be had, but it is not the same term.
    async with contest.database.transaction() as tx:
        await tx.execute("UPDATE loop_leases SET term = term + 1, lease_until = '-infinity', owner = gen_random_uuid()")
    await contest.until("run", "run")
    assert await other.hold() is None
    assert await contest.query("SELECT term FROM loop_leases") == [(3,)]
    await ended(leading)


async def test_what_is_written_outside_of_the_term_is_refused(contest: Contest) -> None:
    """A leader that was stopped past its lease goes on in the middle of a pass."""
    lease, other, goes_on, refused = contest.lease(), contest.lease(), asyncio.Event(), []

    async def loop() -> None:
        async with lease.transaction():
            contest.runs.append("pass")
        await goes_on.wait()
        for enter in (lease.transaction, lease.connection):
            try:
                async with enter():
                    raise AssertionError
            except LeaseLost:
                refused.append(enter)
        async with lease.transaction():
            raise AssertionError

    leading = asyncio.create_task(lease.lead(loop))
    await contest.until("pass")
    await contest.run_out()
    assert await other.hold() == 2
    goes_on.set()
    await asyncio.to_thread(eventually, lambda: len(refused) == 2, "both are refused")
    # The loss has ended the pass, not the process: it waits for its next term.
    await asyncio.wait([leading], timeout=0.2)
    assert not leading.done()
    await ended(leading)


async def test_a_lease_that_has_run_out_allows_nothing_though_nobody_has_taken_it(contest: Contest) -> None:
    lease = contest.lease()
    leading = contest.leading(lease, "run")
    await contest.until("run")
    await contest.run_out()
    with pytest.raises(LeaseLost):
        async with lease.transaction():
            pass
    await ended(leading)


async def test_nobody_takes_a_lease_while_its_holder_is_writing(contest: Contest) -> None:
    lease, other = contest.lease(), contest.lease()
    leading = contest.leading(lease, "run")
    await contest.until("run")
    await contest.query("UPDATE loop_leases SET lease_until = clock_timestamp() + interval '1 second'")
    async with lease.transaction():
        taking = asyncio.create_task(other.hold())
        await contest.until_there_is("FROM pg_locks WHERE NOT granted")
        await contest.until_there_is("FROM loop_leases WHERE lease_until < clock_timestamp()")
        assert not taking.done()
    assert await taking == 2
    await ended(leading)


async def test_a_loop_that_returns_or_raises_ends_who_leads(contest: Contest) -> None:
    async def returns() -> None:
        pass

    async def raises() -> None:
        raise ValueError

    ends: list[tuple[Callable[[], Any], type[Exception]]] = [(returns, LoopEnded), (raises, ValueError)]
    for loop, error in ends:
        with pytest.raises(ExceptionGroup) as caught:
            await contest.lease().lead(loop)
        assert caught.group_contains(error)
