"""Keeps the registry's own house: the audit log's months, its denials, old operations, counts, the feed, old keys.

Invariant: everything here may be done twice, and may be left for later: what is behind only takes
more room or more time to read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from services.shared.errors import Unavailable

log = structlog.get_logger(__name__)

_PERIOD_S = 20.0


class Audit(Protocol):
    async def make_partitions(self) -> list[str]: ...
    async def drop_partitions(self, kept_days: int) -> list[str]: ...
    async def drop_operations(self, kept_days: int) -> None: ...
    async def record_denials(self) -> None: ...


class Counts(Protocol):
    async def fold_counts(self) -> None: ...


class Feed(Protocol):
    async def drop_read_changes(self) -> None: ...


class IdempotencyKeys(Protocol):
    async def drop_expired(self) -> None: ...


class Housekeeping:
    """Args:
    audit: the audit log.
    counts: the fleet's counts.
    feed: the change feed.
    keys: idempotency keys.
    audit_retention_days: how long audit events, and operations that have ended, are kept.
    """

    def __init__(
        self,
        audit: Audit,
        counts: Counts,
        feed: Feed,
        keys: IdempotencyKeys,
        *,
        audit_retention_days: int,
    ) -> None:
        self._audit = audit
        self._counts = counts
        self._feed = feed
        self._keys = keys
        self._audit_retention_days = audit_retention_days

    async def run(self) -> None:
        while True:
            await self.tick()
            await asyncio.sleep(_PERIOD_S)

    async def tick(self) -> None:
        """Does all that there is to do."""
        chores: tuple[Callable[[], Awaitable[None]], ...] = (
            self._make_months,
            self._drop_months,
            self._drop_operations,
            self._audit.record_denials,
            self._counts.fold_counts,
            self._feed.drop_read_changes,
            self._keys.drop_expired,
        )
        for chore in chores:
            try:
                await chore()
            except Unavailable:
                # One that has to wait for somebody doesn't hold up the others.
                log.warning("chore_postponed", chore=chore.__name__)

    async def _make_months(self) -> None:
        for partition in await self._audit.make_partitions():
            log.info("audit_month_made", partition=partition)

    async def _drop_months(self) -> None:
        for partition in await self._audit.drop_partitions(self._audit_retention_days):
            log.info("audit_month_dropped", partition=partition)

    async def _drop_operations(self) -> None:
        await self._audit.drop_operations(self._audit_retention_days)
