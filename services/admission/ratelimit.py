"""The limit on a product's admits: no more than `rate_limit_rpm` in any 60 seconds, over all replicas.

Each replica holds a share of a product's limit, leased from a ledger that all replicas have in
common. It counts its own admits on its own monotonic clock, and makes no more of them in any window
than its share. The ledger never lets the shares of a product add up to more than the limit.

Why that is exact: at any moment the admits that a replica has made in the past window are at most
the share that the ledger believes it to have (`Share` says by which rules), be it that answers are
lost, that the ledger is out of reach, or that a policy changes; and the sum of what the ledger
believes is at most the limit whenever it grants. A share of a replica that has left counts until its
admits have left the window, and one that is not heard of until it cannot be used any more.

Why little of it stays unused: what a replica does not need is given back after a lease, or sooner
if others are short, and while they stay short nobody uses more than an even part.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import inf
from typing import Protocol
from uuid import UUID

import structlog

from services.admission.domain import Product
from services.admission.metrics import CLAIMS, EXCHANGES, TOKENS
from services.admission.ratelimit_ledger import ANSWER_S, LEASE_S, PROMISED_ANSWERS, WINDOW_S, Claim, Ledger
from services.admission.ratelimit_share import Share, Waiter
from services.shared.errors import RateLimited, ServiceError, Unavailable
from services.shared.loops import Pulse

log = structlog.get_logger(__name__)

# How long a call waits for what others give up: till they have noticed, and it has asked again.
_RECLAIMING_LEASES = 3
# Without an admit in the past window, the ledger is asked this seldom whether others are short.
_RESTING_LEASES = 3
# So many unused shares are claimed anew at once, which does not keep others waiting for their locks.
_RENEWED_AT_ONCE = 500


class Limiter(Protocol):
    async def take(self, product: Product) -> None:
        """Takes one token of the product's.

        Raises:
            RateLimited: none is left; says after how many seconds one is.
            Unavailable: nobody can grant one now.
        """


class LeasedLimiter:
    """Args:
    ledger: where the shares come from.
    stale_ok_s: how long a share holds without the ledger, in seconds.
    window_s: of the limit.
    lease_s: after which unused tokens are given back, in seconds. One claim in that time, for
        all products together, keeps a busy replica going.
    answer_s: the ledger's longest wait.
    clock: seconds that never go back.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        stale_ok_s: float,
        window_s: float = WINDOW_S,
        lease_s: float = LEASE_S,
        answer_s: float = ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._stale_ok_s = stale_ok_s
        self._window_s = window_s
        self._lease_s = lease_s
        self._promised_s = PROMISED_ANSWERS * answer_s
        self._clock = clock
        self._shares: dict[UUID, Share] = {}
        self._waiting: dict[UUID, Share] = {}
        self._asked = Pulse()
        self._reachable = True
        self._rests_until = -inf

    def take_now(self, product: Product) -> bool:
        """Takes a token that is at hand; false if the registry has to be asked for it. Never waits.

        Raises:
            RateLimited: as far as is known none is left; says after how many seconds one is.
        """
        limit = product.rate_limit_rpm
        if limit is None:
            return True
        share = self._shares.get(product.product_id)
        if share is None:
            return False
        if share.limit != limit:
            share.limited(limit)
        now = self._clock()
        if share.take(now):
            return True
        if now < share.ask_at and len(share.waiters) >= share.reclaimable:
            share.refused += 1
            raise _limited(share, now)
        return False

    async def take(self, product: Product) -> None:
        if self.take_now(product):
            return
        assert product.rate_limit_rpm is not None
        share = self._shares.get(product.product_id)
        if share is None:
            share = self._shares[product.product_id] = Share(
                product.product_id,
                product.rate_limit_rpm,
                window_s=self._window_s,
                lease_s=self._lease_s,
                stale_ok_s=self._stale_ok_s,
                promised_s=self._promised_s,
            )
        now = self._clock()
        if not self._reachable:
            raise _unreachable(share, now)
        waiter = Waiter(asyncio.get_running_loop().create_future(), now + _RECLAIMING_LEASES * self._lease_s)
        share.waiters.append(waiter)
        if now >= share.ask_at:
            self._waiting[product.product_id] = share
            self._asked.give()
        await waiter.token

    def held(self) -> int:
        """Admits in a window that this replica may make without asking, of all products together."""
        return sum(share.bound for share in list(self._shares.values()))

    def waiting(self) -> int:
        """Calls that wait for a token."""
        return sum(len(share.waiters) for share in list(self._shares.values()))

    async def run(self) -> None:
        """Asks for what calls wait for, one exchange at a time, and looks after all shares once in a lease."""
        tick_at = self._clock()
        while True:
            await self._asked.wait(max(tick_at - self._clock(), 0))
            if self._clock() < tick_at:
                # None if the timer was early.
                if asking := self._asking():
                    await self._exchange({share: share.claim(self._clock(), promised=True) for share in asking}, [])
            else:
                tick_at = self._clock() + self._lease_s
                await self.tick()

    async def tick(self) -> None:
        """Claims what is needed of late, gives back what isn't, and tries again if the ledger was out of reach."""
        now = self._clock()
        self._asking()
        shares = self._shares.values()
        due = dict.fromkeys(share for share in shares if share.due(now))
        if self._reachable:
            due |= dict.fromkeys(islice((share for share in shares if share.aged(now)), _RENEWED_AT_ONCE))
        claims = {share: share.claim(now, promised=self._reachable) for share in due}
        for share in shares:
            TOKENS.inc(share.lapse())
        if claims or now >= self._rests_until or not self._reachable or any(share.count for share in shares):
            self._rests_until = now + _RESTING_LEASES * self._lease_s
            await self._exchange(claims, [share.product_id for share in shares if share.spare and share not in claims])
        for share in [share for share in claims if share.empty]:
            del self._shares[share.product_id]

    async def close(self) -> None:
        """Gives back all that was not used; without the ledger, it is kept until it can't be used any more."""
        now = self._clock()
        try:
            await self._ledger.exchange([share.leave(now) for share in self._shares.values()], [])
            await self._ledger.leave()
        except Unavailable:
            log.warning("shares_kept", shares=len(self._shares))
        for share in self._shares.values():
            self._serve(share, _unreachable)

    def _asking(self) -> list[Share]:
        """The shares for which calls wait, which from now on have been asked for."""
        asking, self._waiting = list(self._waiting.values()), {}
        return asking

    async def _exchange(self, claims: Mapping[Share, Claim], spare: Sequence[UUID]) -> None:
        limits = {share: share.limit for share in claims}
        sent_at = self._clock()
        try:
            grants = await self._ledger.exchange(list(claims.values()), spare)
        except Unavailable:
            EXCHANGES.labels("failed").inc()
            self._reachable = False
            self._waiting = {}
            for share in self._shares.values():
                self._serve(share, _unreachable)
            return
        EXCHANGES.labels("answered").inc()
        CLAIMS.inc(len(claims))
        self._reachable = True
        now = self._clock()
        for share, claim in claims.items():
            grant = grants.get(share.product_id)
            if grant is None:
                self._serve(share, _unreachable)
            else:
                share.settle(claim, grant, limits[share], sent_at, now)
                # Got what it needed, and other calls were quicker: once more.
                again = now >= share.ask_at
                self._serve(share, _limited, patient=len(share.waiters) if again else grant.reclaimable)
                if again and share.waiters:
                    self._waiting[share.product_id] = share
                    self._asked.give()
        for product_id in set(spare) & grants.keys():
            self._shares[product_id].contended()

    def _serve(self, share: Share, refusal: Callable[[Share, float], ServiceError], *, patient: int = 0) -> None:
        """Gives tokens to the calls that wait, and refuses the others, but for so many whose time is not up."""
        now = self._clock()
        waiters, share.waiters = share.waiters, []
        for waiter in waiters:
            if waiter.token.done():
                continue
            if share.take(now):
                waiter.token.set_result(None)
            elif len(share.waiters) < patient and now < waiter.until:
                share.waiters.append(waiter)
            else:
                waiter.token.set_exception(refusal(share, now))


def _limited(share: Share, now: float) -> RateLimited:
    return RateLimited(f"the product is over its {share.limit} admits a minute", retry_after_s=share.free_after_s(now))


def _unreachable(share: Share, now: float) -> ServiceError:
    # Certain, whatever the others have.
    return _limited(share, now) if share.full(now) else Unavailable("the registry can't be reached")
