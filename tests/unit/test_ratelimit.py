"""A replica's side of the rate limit, on a clock that is turned by hand and a ledger in memory."""

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from uuid import uuid4

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from services.admission.ratelimit_ledger import ANSWER_S, LEASE_S, PROMISED_ANSWERS, WINDOW_S, Claim
from services.admission.ratelimit_share import Share
from tests.rate_ledger import Ledger

STALE_OK_S = 100.0
PROMISED_S = PROMISED_ANSWERS * ANSWER_S
PRODUCT = uuid4()
NUMBERS = count(1)


def ledger(limit: int) -> Ledger:
    return Ledger(
        limit,
        window_s=WINDOW_S,
        stale_ok_s=STALE_OK_S,
        lease_s=LEASE_S,
        answer_s=ANSWER_S,
        promised_s=PROMISED_S - 2 * ANSWER_S,
    )


def share(limit: int) -> Share:
    return Share(PRODUCT, limit, window_s=WINDOW_S, lease_s=LEASE_S, stale_ok_s=STALE_OK_S, promised_s=PROMISED_S)


def exchange(ledger: Ledger, share: Share, now: float, *, needs: int = 0) -> Claim:
    share.refused = needs
    claim = share.claim(now, promised=True)
    grant = ledger.claim(share, next(NUMBERS), claim, now)
    assert grant is not None
    share.settle(claim, grant, share.limit, now, now)
    share.lapse()
    return claim


def taken(share: Share, now: float) -> int:
    """How many tokens there are."""
    n = 0
    while share.take(now):
        n += 1
    return n


def test_nothing_is_admitted_before_the_ledger_has_answered() -> None:
    mine = share(10)
    assert not mine.take(0)
    mine.claim(0, promised=True)
    assert not mine.take(0)


def test_an_admit_leaves_the_window_after_a_window_and_no_sooner() -> None:
    mine, shares = share(2), ledger(2)
    exchange(shares, mine, 0, needs=2)
    assert taken(mine, 1.0) == 2
    exchange(shares, mine, 60.9)
    assert not mine.take(60.99)
    assert mine.take(61.0)


def test_a_promise_is_not_exceeded_until_it_has_run_out() -> None:
    """Whoever buries this replica soon after its last claim counts on it."""
    mine, shares = share(10), ledger(10)
    exchange(shares, mine, 0, needs=10)
    assert taken(mine, 0.0) == 10
    claim = exchange(shares, mine, 58.0)
    assert claim.promise == 0
    # They have left the window, but the ledger has been told of no admit.
    assert taken(mine, 60.1) == 0
    assert taken(mine, 58.0 + PROMISED_S) == 10


def test_a_claim_that_is_lost_promises_no_more_than_the_one_before() -> None:
    mine, shares = share(10), ledger(10)
    exchange(shares, mine, 0, needs=10)
    assert taken(mine, 0.0) == 10
    exchange(shares, mine, 59.0)
    lost = mine.claim(59.9, promised=True)
    assert lost.promise == 10
    assert taken(mine, 60.1) == 0


def test_without_answers_a_share_holds_for_as_long_as_was_said() -> None:
    mine = share(10)
    exchange(ledger(10), mine, 0)
    mine.claim(1.0, promised=False)
    assert mine.take(STALE_OK_S - 1)
    assert not mine.take(STALE_OK_S)


def test_a_lower_limit_admits_nobody_until_the_ledger_has_answered_to_it() -> None:
    mine, shares = share(10), ledger(10)
    exchange(shares, mine, 0)
    stale = mine.claim(0.5, promised=True)
    mine.limited(4)
    assert not mine.take(0.6)
    grant = shares.claim(mine, next(NUMBERS), stale, 0.6)
    assert grant is not None
    mine.settle(stale, grant, 10, 0.5, 0.7)
    assert not mine.take(0.7)


def test_a_higher_limit_keeps_nobody_waiting() -> None:
    mine, shares = share(10), ledger(10)
    exchange(shares, mine, 0)
    shares.limit = 20
    mine.limited(20)
    assert taken(mine, 0.1) == 5
    exchange(shares, mine, 0.2, needs=20)
    assert taken(mine, 0.3) == 15


def test_while_nobody_is_short_half_of_the_limit_is_spread_for_the_time_without_a_ledger() -> None:
    replicas, shares = [share(60) for _ in range(3)], ledger(60)
    for now in (0.0, 0.3, 0.6):
        for mine in replicas:
            exchange(shares, mine, now)
    assert [taken(mine, 0.7) for mine in replicas] == [10, 10, 10]


def test_without_the_ledger_busy_replicas_go_on_at_their_pace_and_do_not_pause() -> None:
    """They use four fifths of the limit."""
    replicas, shares = [share(600) for _ in range(2)], ledger(600)
    lost_at, now = 2 * WINDOW_S, 0.0
    for mine in replicas:
        exchange(shares, mine, now)
    while now < lost_at + STALE_OK_S - 1:
        for mine in replicas:
            assert mine.take(now)
            if now < lost_at:
                exchange(shares, mine, now)
            else:
                mine.claim(now, promised=False)
        now += WINDOW_S / 240


def test_whoever_stays_short_gets_an_even_part_as_the_admits_of_the_others_leave_the_window() -> None:
    first, second, shares = share(20), share(20), ledger(20)
    exchange(shares, first, 0, needs=20)
    assert taken(first, 0.0) == 20
    now = 0.0
    while now < 62:
        now += LEASE_S
        for mine in (first, second):
            taken(mine, now)
            exchange(shares, mine, now, needs=20)
    assert [exchange(shares, mine, now).lasting[0] for mine in (first, second)] == [10, 10]


def test_of_one_that_died_its_promise_is_held_or_what_its_share_allowed() -> None:
    """It had admitted 10 evenly over a minute, the last of them long enough ago."""

    def left(buried_after_s: float) -> int:
        dead, other, shares = share(10), share(10), ledger(10)
        exchange(shares, dead, 0, needs=10)
        for n in range(10):
            assert dead.take(6.0 * n)
        exchange(shares, dead, 54.0)
        shares.bury(dead, 54.0 + buried_after_s)
        now = 70.0 + buried_after_s
        exchange(shares, other, now, needs=10)
        return taken(other, now)

    # At 71 s those of 0, 6 have left, for moments may be wrong by a second.
    assert left(1.0) == 2
    # One more may have been admitted in place of that of 0.
    assert left(6.0) == 2
    assert left(30.0) < 4


@dataclass
class Replica:
    """A limiter, with a claim on its way at the most; what it has given up may arrive all the same."""

    share: Share
    reachable: bool = True
    sent: tuple[int, Claim, float] | None = None
    given_up: list[tuple[int, Claim, float]] = field(default_factory=list)


class Limit(RuleBasedStateMachine):
    """Whatever is lost or late, and whoever dies: in no window more than the limit."""

    @initialize(limit=st.integers(1, 40), replicas=st.integers(1, 4))
    def begin(self, limit: int, replicas: int) -> None:
        self.now = 0.0
        self.limit = limit
        self.ledger = ledger(limit)
        self.replicas = [Replica(share(limit)) for _ in range(replicas)]
        self.dead: list[Replica] = []
        self.admits: deque[float] = deque(maxlen=limit)

    def chosen(self, which: int) -> Replica:
        return self.replicas[which % len(self.replicas)]

    def admit(self, replica: Replica, n: int) -> None:
        for _ in range(n):
            if not replica.share.take(self.now):
                replica.share.refused += 1
                continue
            assert len(self.admits) < self.limit or self.now - self.admits[0] >= WINDOW_S - 1e-9
            self.admits.append(self.now)

    def send(self, replica: Replica) -> None:
        if replica.sent is not None:
            replica.reachable = False
            replica.given_up.append(replica.sent)
        claim = replica.share.claim(self.now, promised=replica.reachable)
        replica.sent = (next(NUMBERS), claim, self.now)
        replica.share.lapse()

    def arrive(self, replica: Replica, *, answered: bool) -> None:
        assert replica.sent is not None
        number, claim, sent_at = replica.sent
        grant = self.ledger.claim(replica.share, number, claim, self.now)
        if answered and grant is not None:
            replica.share.settle(claim, grant, self.limit, sent_at, self.now)
            replica.reachable, replica.sent = True, None

    @rule(by=st.sampled_from((0.01, 0.1, 0.3, 1.0, 3.0, 20.0, 50.0)))
    def time_goes_by(self, by: float) -> None:
        self.now += by

    @rule(which=st.integers(0, 3), n=st.integers(1, 20))
    def calls(self, which: int, n: int) -> None:
        self.admit(self.chosen(which), n)

    @rule(which=st.integers(0, 3))
    def claims(self, which: int) -> None:
        self.send(self.chosen(which))

    @rule(which=st.integers(0, 3), answered=st.booleans())
    def a_claim_arrives(self, which: int, answered: bool) -> None:
        replica = self.chosen(which)
        if replica.sent is not None and self.now <= replica.sent[2] + ANSWER_S:
            self.arrive(replica, answered=answered)

    @rule(which=st.integers(0, 3))
    def a_claim_arrives_that_was_given_up(self, which: int) -> None:
        for replica in (self.chosen(which), *self.dead):
            for number, claim, sent_at in replica.given_up:
                if self.now <= sent_at + ANSWER_S:
                    self.ledger.claim(replica.share, number, claim, self.now)

    @rule(rounds=st.integers(1, 60), every=st.sampled_from((0.1, 0.3, 1.0, 2.0)), n=st.integers(1, 5))
    def all_are_busy(self, rounds: int, every: float, n: int) -> None:
        for _ in range(rounds):
            self.now += every
            for replica in self.replicas:
                self.admit(replica, n)
                self.send(replica)
                self.arrive(replica, answered=True)
                self.admit(replica, n)

    @rule(which=st.integers(0, 3))
    def one_dies(self, which: int) -> None:
        replica = self.chosen(which)
        self.replicas[self.replicas.index(replica)] = Replica(share(self.limit))
        self.dead.append(replica)

    @precondition(lambda self: self.dead)
    @rule()
    def one_is_buried(self) -> None:
        self.ledger.bury(self.dead.pop().share, self.now)

    @rule(which=st.integers(0, 3))
    def one_leaves(self, which: int) -> None:
        replica = self.chosen(which)
        self.replicas[self.replicas.index(replica)] = Replica(share(self.limit))
        if self.ledger.claim(replica.share, next(NUMBERS), replica.share.leave(self.now), self.now) is not None:
            self.ledger.leave(replica.share, self.now)


Limit.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestLimit = Limit.TestCase
