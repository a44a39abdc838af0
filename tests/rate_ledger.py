"""The ledger of shares of a rate limit, in memory: does all that the one in PostgreSQL does.

But for the tokens of the version before, and steps of its clock.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil, floor, inf

from services.admission.ratelimit_ledger import Claim, Grant


@dataclass
class _Row:
    """A replica's share, as `rate_shares` has it."""

    claim_no: int
    share: int
    need: int
    unknown: int
    lasting: list[int]
    heard_at: float
    until: float
    short_since: float | None
    short_until: float | None
    left_at: float | None = None

    def short(self, at: float) -> bool:
        return self.left_at is None and self.short_until is not None and self.short_until > at


class Ledger:
    """All shares of one product.

    Args:
        limit: of the product; may be changed.
        window_s, stale_ok_s, lease_s, answer_s: as for the limiter.
        promised_s: how long it counts on a promise.
    """

    def __init__(
        self, limit: int, *, window_s: float, stale_ok_s: float, lease_s: float, answer_s: float, promised_s: float
    ) -> None:
        self.limit = limit
        self._window_s = window_s
        self._stale_ok_s = stale_ok_s
        self._lease_s = lease_s
        self._slack_s = answer_s
        self._promised_s = promised_s
        self._rows: dict[Hashable, _Row] = {}

    def claim(self, replica: Hashable, claim_no: int, claim: Claim, at: float) -> Grant | None:
        """Carries out a claim; None if a later one was carried out before, or the replica has left."""
        mine = self._rows.get(replica)
        if mine is not None and (mine.claim_no >= claim_no or mine.left_at is not None):
            return None
        self._rows = {
            other: row
            for other, row in self._rows.items()
            if other == replica
            or (row.until if row.left_at is None else row.left_at + self._window_s + self._slack_s) > at
        }
        others = [row for other, row in self._rows.items() if other != replica]
        alive = [row for row in others if row.left_at is None]
        taken = sum(self._taken(row, at) for row in others)
        parts = 1 + sum(row.share > 0 or row.short(at) for row in alive)
        free = max(self.limit - taken - claim.bound, 0)
        if taken + claim.bound > self.limit:
            cap = self.limit // parts
        elif any(row.short(at) and (row.short_since or at) < at - 2 * self._lease_s for row in alive):
            cap = ceil(self.limit / parts)
        else:
            cap = self.limit
        short = claim.need > claim.bound + free or claim.need > cap
        spare = sum(max(row.share - row.need, 0) for row in alive)
        unneeded = max(self.limit - (taken - spare) - claim.need, 0)
        keep = 0 if short or any(row.short(at) for row in alive) else claim.need + unneeded // (2 * parts)
        granted = min(max(min(max(claim.need, keep), cap) - claim.bound, 0), free)
        since = at if short else None
        if mine is not None and mine.short_until is not None and mine.short_until > at:
            since = min((moment for moment in (mine.short_since, since) if moment is not None), default=None)
        promise = claim.bound if claim.promise is None else claim.promise
        self._rows[replica] = _Row(
            claim_no,
            claim.bound + granted,
            claim.need,
            promise + granted,
            claim.lasting,
            at,
            at + self._stale_ok_s + self._window_s + self._slack_s,
            since,
            at + 3 * self._lease_s if short else None,
        )
        reclaimable = 0
        if since is not None and since > at - 3 * self._lease_s:
            reclaimable = spare
        return Grant(granted, cap, keep, reclaimable, self._wait_s(at) if short else None)

    def spare(self, replica: Hashable, at: float) -> bool:
        """Whether others are short of what this replica could spare."""
        return any(row.short(at) for other, row in self._rows.items() if other != replica)

    def bury(self, replica: Hashable, at: float) -> None:
        """The replica has died."""
        row = self._rows.get(replica)
        if row is None or row.left_at is not None:
            return
        slots = len(row.lasting)
        slot = ceil((at - row.heard_at + 2 * self._slack_s) / self._window_s * slots)
        row.unknown = min(
            row.unknown if row.heard_at > at - self._promised_s else row.share,
            row.share - (row.lasting[slot] if slot < slots else 0),
        )
        row.left_at = at

    def leave(self, replica: Hashable, at: float) -> None:
        """The replica has made known all that it has admitted."""
        row = self._rows.get(replica)
        if row is not None and row.left_at is None:
            row.left_at, row.share, row.unknown = at, min(row.share, row.lasting[0]), 0

    def _taken(self, row: _Row, at: float) -> int:
        if row.left_at is None:
            return row.share if row.until > at else 0
        slots = len(row.lasting)
        slot = floor(max(at - self._slack_s - row.heard_at, 0) / self._window_s * slots)
        unknown = row.unknown if row.left_at > at - self._window_s - self._slack_s else 0
        return min(row.share, unknown + (row.lasting[slot] if slot < slots else 0))

    def _wait_s(self, at: float) -> float | None:
        """Until the next admit of anybody leaves the window."""
        leaving = inf
        for row in self._rows.values():
            slot_s = self._window_s / len(row.lasting)
            for slot, (now, later) in enumerate(zip(row.lasting, [*row.lasting[1:], 0], strict=True), 1):
                moment = row.heard_at + slot * slot_s
                if later < now and moment > at:
                    leaving = min(leaving, moment)
        return None if leaving == inf else leaving - at
