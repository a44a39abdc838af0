"""The right to act on an operation."""

import time

from services.provisioner.domain.operation import GiveWay, LeaseLost


class Lease:
    """Holds until a moment on this process's monotonic clock."""

    def __init__(self, until: float, *, give_way: bool = False) -> None:
        self._until = until
        self._give_way = give_way

    def renew(self, until: float, *, give_way: bool) -> None:
        self._until = until
        self._give_way = give_way

    def revoke(self) -> None:
        """Makes the next check fail: the operation is to be handed over."""
        self._until = 0.0

    def check(self) -> None:
        """To be called before every effect.

        Raises:
            LeaseLost: the lease has run out.
            GiveWay: something that matters more waits for this operation's end.
        """
        if time.monotonic() >= self._until:
            raise LeaseLost
        if self._give_way:
            raise GiveWay
