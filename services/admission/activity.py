"""What Admission knows of use: who was admitted, how long engines are to stay awake, who was denied.

Collected in memory and flushed in bulk. Whoever puts an engine to sleep rests on one promise: once
this replica's `flushed_at` lies after a moment, everything is in the registry that it admitted
without knowing what was committed before that moment.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Protocol
from uuid import UUID

import structlog

from services.admission.metrics import FLUSHES
from services.shared import queries
from services.shared.errors import Unavailable
from services.shared.postgres import Database

log = structlog.get_logger(__name__)

_SQL = queries.load(files("services.admission") / "sql" / "activity.sql")
_INTERVAL_S = 1.0


class Activity(Protocol):
    def admitted(self, engine_id: UUID, keep_awake_s: float) -> None:
        """Notes that an engine was handed out, and is to stay awake for `keep_awake_s` seconds."""

    def denied(self, product_id: UUID, reason: str) -> None:
        """Notes a denial, by its reason or the code of its error."""


@dataclass(slots=True)
class _Use:
    """Moments on this process's monotonic clock."""

    admitted_at: float
    awake_until: float


class ActivityLog:
    """Args:
    database: the registry.
    replica_id: random per start of a process.
    known_at: moment on the registry's clock of which this replica knows all changes; what it
        admits to from then on rests on what the registry held at that moment or later.
    """

    def __init__(self, database: Database, replica_id: UUID, known_at: Callable[[], datetime]) -> None:
        self._database = database
        self._known_at = known_at
        self._replica = {"replica_id": replica_id}
        self._uses: dict[UUID, _Use] = {}
        self._denials: Counter[tuple[UUID, str]] = Counter()

    def admitted(self, engine_id: UUID, keep_awake_s: float) -> None:
        now = time.monotonic()
        use = self._uses.setdefault(engine_id, _Use(now, now))
        use.admitted_at = now
        use.awake_until = max(use.awake_until, now + keep_awake_s)

    def denied(self, product_id: UUID, reason: str) -> None:
        self._denials[product_id, reason] += 1

    async def open(self) -> None:
        """Makes this replica known, so that from now on sleep waits for its flushes."""
        await self.flush()

    async def close(self) -> None:
        """Flushes the last of it; sleep waits for this replica no more.

        Without the registry it is left to be waited for until it must have ended.
        """
        try:
            await self.flush()
            async with self._database.connection() as connection:
                await connection.execute(_SQL["forget_replica"], self._replica)
        except Unavailable:
            log.warning("activity_lost", engines=len(self._uses))

    async def bury(self, replica_id: UUID) -> None:
        """Another replica is known to have died: sleep waits for it no more.

        Nobody knows whom it admitted last, so engines have to be idle for long from now on.

        Raises:
            Unavailable.
        """
        async with self._database.connection() as connection:
            await connection.execute(_SQL["bury_replica"], {"replica_id": replica_id})

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.flush()
            except Unavailable:
                log.warning("activity_kept", engines=len(self._uses))

    async def flush(self) -> None:
        """Writes what has been noted, and up to which moment that is all there is.

        Raises:
            Unavailable: nothing is lost, the next flush has it.
        """
        known_at = self._known_at()
        uses, self._uses = self._uses, {}
        denials, self._denials = self._denials, Counter()
        try:
            await self._write(uses, denials, known_at)
        except BaseException:
            self._denials.update(denials)
            for engine_id, use in uses.items():
                later = self._uses.setdefault(engine_id, use)
                later.awake_until = max(later.awake_until, use.awake_until)
            FLUSHES.labels("failed").inc()
            raise
        FLUSHES.labels("written").inc()

    async def _write(self, uses: dict[UUID, _Use], denials: Counter[tuple[UUID, str]], flushed_at: datetime) -> None:
        now = time.monotonic()
        values = {
            **self._replica,
            "flushed_at": flushed_at,
            "engine_ids": list(uses),
            "ages_s": [now - use.admitted_at for use in uses.values()],
            "awake_s": [use.awake_until - now for use in uses.values()],
            "product_ids": [product_id for product_id, _ in denials],
            "reasons": [reason for _, reason in denials],
            "counts": list(denials.values()),
        }
        async with self._database.connection() as connection:
            await connection.execute(_SQL["flush"], values)
