"""A replica's share of one product's limit, in memory: what was admitted, and what still may be.

Safety rests on four rules, kept here by every step:

1. `count`, the admits of the past window, never exceeds `bound` by an admit.
2. The ledger never believes in a smaller share than `bound`: it is lowered here before a claim is
   sent, and raised only by an answer.
3. After a claim with a promise no more admits follow than were promised, until the next claim is
   answered or the promise has run out.
4. No admit without a claim that the ledger has answered in the past `stale_ok_s`.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from math import inf
from uuid import UUID

from services.admission.ratelimit_ledger import Claim, Grant

# Admits are counted together for this part of the window, as if made last; and made known so.
_RESOLUTION = 1 / 1000
_SLOTS = 60
# A promise covers this many leases, one of which may be missed.
_PROMISED_LEASES = 2
# A share that is not used is claimed anew after this part of the time that it holds without the
# ledger, so that it holds for nearly all of that time whenever the ledger is lost.
_RENEWED_AFTER = 1 / 30


@dataclass(slots=True)
class _Admits:
    began_at: float
    last_at: float
    n: int


@dataclass(frozen=True, slots=True)
class Waiter:
    """A call that waits for its token until `until`."""

    token: "asyncio.Future[None]"
    until: float


class Share:
    """Moments are seconds on the replica's monotonic clock.

    Args:
        product_id: whose limit it is a share of.
        limit: the product's limit, as the caller knows it.
        window_s: the limit's window.
        lease_s: after which what is not used is given back.
        stale_ok_s: how long it holds without an answer of the ledger.
        promised_s: how long a promise holds.
    """

    def __init__(
        self, product_id: UUID, limit: int, *, window_s: float, lease_s: float, stale_ok_s: float, promised_s: float
    ) -> None:
        self.product_id = product_id
        self.limit = limit
        self.waiters: list[Waiter] = []
        self.ask_at = -inf
        """Not worth asking again before."""
        self.free_at = -inf
        """When a token is free, as far as is known, after it was asked in vain."""
        self.reclaimable = 0
        self.refused = 0
        self._window_s = window_s
        self._lease_s = lease_s
        self._stale_ok_s = stale_ok_s
        self._promised_s = promised_s
        self._admits: deque[_Admits] = deque()
        self.count = 0
        self._bound = 0
        self._cap = 0
        self._keep = 0
        self._usable = 0
        self._promise = 0
        self._unanswered = 0
        self._promised_until = -inf
        self._trusted_until = -inf
        self._recent = 0
        self._recent_before = 0

    def take(self, now: float) -> bool:
        """Takes one token, if there is one that needs no asking."""
        if self.count >= self._usable:
            self._forget(now)
            if self.count >= self._usable:
                return False
        if now >= self._trusted_until:
            return False
        if self._promise > 0:
            self._promise -= 1
        elif now < self._promised_until:
            return False
        if self._admits and now - self._admits[-1].began_at < self._window_s * _RESOLUTION:
            self._admits[-1].last_at = now
            self._admits[-1].n += 1
        else:
            self._admits.append(_Admits(now, now, 1))
        self.count += 1
        self._recent += 1
        return True

    def limited(self, limit: int) -> None:
        """The product's limit is another now: a lower one the others may have used up, so the ledger is asked first."""
        if limit < self.limit:
            self._cap = self._usable = 0
        self.limit = limit
        self.ask_at = -inf

    def contended(self) -> None:
        """Others are short of what this share could spare."""
        self._keep = 0

    def full(self, now: float) -> bool:
        """Whether this replica alone has used up the limit."""
        self._forget(now)
        return self.count >= self.limit

    def below_at(self, n: int) -> float:
        """When fewer than `n` admits are in the window, if none is added."""
        leaving = self.count - n + 1
        for admits in self._admits:
            leaving -= admits.n
            if leaving <= 0:
                return admits.last_at + self._window_s
        return inf

    def free_after_s(self, now: float) -> float:
        """Seconds after which a token that was asked for in vain is free, as far as is known."""
        if self.full(now):
            return self.below_at(self.limit) - now
        moment = self.free_at if self.free_at > now else self.ask_at
        return moment - now if moment > now else self._lease_s

    @property
    def bound(self) -> int:
        """The share that it has."""
        return self._bound

    @property
    def spare(self) -> bool:
        return self._keep > 0 and self._bound > self.count

    @property
    def empty(self) -> bool:
        return self._bound == 0 and not self.waiters

    def due(self, now: float) -> bool:
        """Whether the ledger is to hear of it at the end of a lease."""
        self._forget(now)
        return bool(self.waiters or self._recent or self.refused) or self._bound > self._wanted()

    def aged(self, now: float) -> bool:
        """Whether it is to be claimed anew although it is not used."""
        return self._bound > 0 and now >= self._trusted_until - (1 - _RENEWED_AFTER) * self._stale_ok_s

    def lapse(self) -> int:
        """A lease has ended: what is needed is measured anew. Returns the tokens that were taken in it."""
        self._recent_before, self._recent = self._recent, 0
        self.refused = 0
        return self._recent_before

    def claim(self, now: float, *, promised: bool) -> Claim:
        """Binds itself to what it claims to have.

        Args:
            now: the moment from which the claim is on its way.
            promised: false while the ledger can't be reached: nothing is promised then, nor given back.
        """
        self._forget(now)
        if now >= self._trusted_until:
            self._bound = self.count
        if promised:
            self._bound = max(self.count, min(self._bound, self._wanted()))
        return self._bound_claim(now, self._need(), promised=promised)

    def leave(self, now: float) -> Claim:
        """Ends: no more admits."""
        self._forget(now)
        self._bound, self._usable, self._cap = self.count, 0, 0
        return Claim(self.product_id, self.count, self.count, 0, self._lasting(now))

    def settle(self, claim: Claim, grant: Grant, limit: int, sent_at: float, now: float) -> None:
        """Takes in the answer to its last claim.

        Args:
            claim: which.
            grant: the answer.
            limit: the product's limit when it was claimed.
            sent_at: when it was sent, from which moment it holds.
            now: when it was answered.
        """
        self._bound += grant.granted
        self._promise += self._unanswered + grant.granted
        self._trusted_until = sent_at + self._stale_ok_s
        self._keep = grant.keep
        if limit == self.limit:
            self._cap = grant.cap
        self._usable = min(self._bound, self._cap)
        self.reclaimable = grant.reclaimable
        self.ask_at = self.free_at = -inf
        if claim.bound + grant.granted < claim.need or grant.cap < claim.need:
            # Beyond the end of the lease, at which the ledger is asked again if anybody was refused.
            self.ask_at = sent_at + 1.5 * self._lease_s
            self.free_at = min(self.below_at(self._usable), max(self.ask_at, now + (grant.wait_s or 0)))

    def _bound_claim(self, now: float, need: int, *, promised: bool) -> Claim:
        self._usable = min(self._bound, self._cap)
        lasting = self._lasting(now)
        promise = None
        self._unanswered = 0
        if promised:
            leaving = self.count - self._still(now + _PROMISED_LEASES * self._lease_s)
            promise = self._bound - self.count + leaving
            if now < self._promised_until:
                # The claim may be lost: until it is answered, the last promise holds as well.
                self._unanswered = max(promise - self._promise, 0)
            self._promise = promise - self._unanswered
            self._promised_until = now + self._promised_s
        return Claim(self.product_id, self._bound, need, promise, lasting)

    def _need(self) -> int:
        # A lease and a half at the rate of late, so that a busy product does not wait; and a token
        # at a time for a slow one, that would give back any other.
        recent = max(self._recent, self._recent_before)
        headroom = 2 * recent if recent > 1 else 0
        waiting = sum(not waiter.token.done() for waiter in self.waiters)
        return self.count + waiting + max(headroom, self.refused)

    def _wanted(self) -> int:
        return min(self._cap, max(self._need(), self._keep))

    def _forget(self, now: float) -> None:
        """Lets go of what has left the window."""
        admits = self._admits
        while admits and admits[0].last_at + self._window_s <= now:
            self.count -= admits.popleft().n

    def _still(self, moment: float) -> int:
        """Admits that are still in the window at a moment to come."""
        return sum(admits.n for admits in self._admits if admits.last_at + self._window_s > moment)

    def _lasting(self, now: float) -> list[int]:
        slot_s = self._window_s / _SLOTS
        lasting = [0] * _SLOTS
        for admits in self._admits:
            lasting[min(_SLOTS - 1, int((admits.last_at + self._window_s - now) / slot_s))] += admits.n
        for slot in range(_SLOTS - 1, 0, -1):
            lasting[slot - 1] += lasting[slot]
        return lasting
