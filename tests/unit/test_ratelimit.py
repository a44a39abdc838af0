"""A replica's side of the rate limit, on a clock that is turned by hand and a ledger in memory."""

import random
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st

from services.admission.ratelimit_ledger import Claim, Grant
from services.admission.ratelimit_share import Share

WINDOW_S = 60.0
LEASE_S = 0.3
STALE_OK_S = 300.0
PROMISED_S = 8.0
PRODUCT = uuid4()


class Ledger:
    """All shares of one product: what `claim_shares` does, but for the dead and for what is fair."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shares: dict[int, int] = {}
        self.needs: dict[int, int] = {}

    def claim(self, replica: int, claim: Claim) -> Grant:
        others = sum(share for other, share in self.shares.items() if other != replica)
        free = max(self.limit - others - claim.bound, 0)
        short = claim.need > claim.bound + free
        keep = 0 if short else self.limit // (2 * max(len(self.shares), 1))
        granted = min(max(max(claim.need, keep) - claim.bound, 0), free)
        self.shares[replica] = claim.bound + granted
        return Grant(granted, self.limit, keep, 0, 10.0 if short else None)


def share(limit: int) -> Share:
    return Share(PRODUCT, limit, window_s=WINDOW_S, lease_s=LEASE_S, stale_ok_s=STALE_OK_S, promised_s=PROMISED_S)


def exchange(ledger: Ledger, share: Share, now: float, *, replica: int = 0, promised: bool = True) -> Claim:
    claim = share.claim(now, promised=promised)
    share.settle(claim, ledger.claim(replica, claim), share.limit, now, now)
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
    mine, ledger = share(2), Ledger(2)
    mine.refused = 2
    exchange(ledger, mine, 0)
    assert taken(mine, 1.0) == 2
    exchange(ledger, mine, 60.9)
    assert not mine.take(60.99)
    assert mine.take(61.0)


def test_a_promise_is_not_exceeded_until_it_has_run_out() -> None:
    """Whoever buries this replica soon after its last claim counts on it."""
    mine, ledger = share(10), Ledger(10)
    mine.refused = 10
    exchange(ledger, mine, 0)
    assert taken(mine, 0.0) == 10
    mine.lapse()
    claim = exchange(ledger, mine, 55.0)
    assert claim.promise == 0
    # They have left the window, but the ledger has been told of no admit.
    assert taken(mine, 60.1) == 0
    assert taken(mine, 55.0 + PROMISED_S) == 10


def test_a_claim_that_is_lost_promises_no_more_than_the_one_before() -> None:
    mine, ledger = share(10), Ledger(10)
    mine.refused = 10
    exchange(ledger, mine, 0)
    assert taken(mine, 0.0) == 10
    exchange(ledger, mine, 59.0)
    lost = mine.claim(59.9, promised=True)
    assert lost.promise == 10
    assert taken(mine, 60.1) == 0


def test_without_answers_a_share_holds_for_as_long_as_was_said() -> None:
    mine, ledger = share(10), Ledger(10)
    exchange(ledger, mine, 0)
    mine.claim(1.0, promised=False)
    assert mine.take(STALE_OK_S - 1)
    assert not mine.take(STALE_OK_S)


def test_a_lower_limit_admits_nobody_until_the_ledger_has_answered_to_it() -> None:
    mine, ledger = share(10), Ledger(10)
    exchange(ledger, mine, 0)
    stale = mine.claim(0.5, promised=True)
    mine.limited(4)
    assert not mine.take(0.6)
    mine.settle(stale, ledger.claim(0, stale), 10, 0.5, 0.7)
    assert not mine.take(0.7)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 40), replicas=st.integers(1, 4))
def test_whatever_is_lost_no_window_has_more_than_the_limit(seed: int, limit: int, replicas: int) -> None:
    chance = random.Random(seed)
    ledger = Ledger(limit)
    shares = [share(limit) for _ in range(replicas)]
    admits: list[float] = []
    now = 0.0
    cut_off: set[int] = set()
    for _ in range(1500):
        now += chance.choice((0.0, 0.01, 0.1, 1.0))
        replica = chance.randrange(replicas)
        mine = shares[replica]
        if chance.random() < 0.01:
            cut_off ^= {replica}
        if chance.random() < 0.6:
            if mine.take(now):
                admits.append(now)
            else:
                mine.refused += 1
            continue
        claim = mine.claim(now, promised=replica not in cut_off)
        lost = chance.random()
        if replica in cut_off and lost < 0.5:
            continue
        grant = ledger.claim(replica, claim)
        # Admits go on while the answer is on its way.
        while chance.random() < 0.5 and mine.take(now):
            admits.append(now)
        if replica not in cut_off and lost < 0.9:
            mine.settle(claim, grant, limit, now, now)
            mine.lapse()
    assert sum(ledger.shares.values()) <= limit
    apart = [later - earlier for earlier, later in zip(admits, admits[limit:], strict=False)]
    assert min(apart, default=WINDOW_S) >= WINDOW_S - 1e-9
