"""What replicas and the ledger of their shares say to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

WINDOW_S = 60.0
LEASE_S = 0.3
ANSWER_S = 1.0
"""Longest wait for an answer of the ledger; what is on its way for longer counts as lost."""

PROMISED_ANSWERS = 4
"""How long a promise holds, in times `ANSWER_S`. The ledger counts on it for two less: what it heard may
have been on its way for one, and it may not have noticed by so much that its clock was set."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a replica asks of the ledger for one product.

    Attributes:
        bound: the share that it has, to which it has bound itself.
        need: the share that it needs; it gives up what it has beyond.
        promise: most admits that follow before its next claim; None for no promise.
        lasting: admits still in the window now, and 1, 2, ... 59 sixtieths of a window later.
    """

    product_id: UUID
    bound: int
    need: int
    promise: int | None
    lasting: list[int]


@dataclass(frozen=True, slots=True)
class Grant:
    """What the ledger answers.

    Attributes:
        granted: by how much the share has grown.
        cap: the share that may be used at the moment, be it smaller.
        keep: the share that may be held without need.
        reclaimable: if it grew by less than needed: how much others may be about to give up.
        wait_s: if it grew by less than needed: seconds until the next admit of anybody leaves the
            window; None if that is not known.
    """

    granted: int
    cap: int
    keep: int
    reclaimable: int
    wait_s: float | None


class Ledger(Protocol):
    """Who holds which share. Errors: `Unavailable` within `ANSWER_S` if there is no answer."""

    async def exchange(self, claims: Sequence[Claim], spare: Sequence[UUID]) -> Mapping[UUID, Grant | None]:
        """Carries out claims, at most one by product.

        Args:
            claims: of this replica.
            spare: products of which this replica holds more than it needs.

        Returns:
            What was granted, by product. None for a product of `spare` that others are short of.
        """

    async def leave(self) -> None:
        """This replica makes no more admits than it has made known."""
