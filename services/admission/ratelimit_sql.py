"""Shares of the rate limits, kept in PostgreSQL."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.resources import files
from typing import Any
from uuid import UUID

import structlog

from services.admission.ratelimit_ledger import ANSWER_S, LEASE_S, PROMISED_ANSWERS, WINDOW_S, Claim, Grant
from services.shared import queries
from services.shared.errors import Unavailable
from services.shared.postgres import Connection, Database, translated

log = structlog.get_logger(__name__)

_SQL = queries.load(files("services.admission") / "sql" / "rate_limit.sql")


async def forget_replica(
    database: Database, replica_id: UUID, *, window_s: float = WINDOW_S, answer_s: float = ANSWER_S
) -> None:
    """A replica makes no more admits: of its shares only what it may have used counts, until that has left the window.

    Only to be called by who knows for certain that it is dead. The sooner, the less of the limit is
    held for it.

    Raises:
        Unavailable.
    """
    error_s = 2 * answer_s
    values = {
        "replica_id": replica_id,
        "window_s": window_s,
        "promised_s": PROMISED_ANSWERS * answer_s - error_s,
        "error_s": error_s,
    }
    async with database.connection() as connection:
        await connection.execute(_SQL["forget_replica"], values)
        await connection.execute(_SQL["forget_numbers"])


class SqlLedger:
    """One statement for all claims of a moment, on a connection of its own: no look at the
    connection before, no wait for one. A statement whose answer is late is given up together with
    its connection; should it come through all the same, a later claim has made it void.

    Args:
        database: the registry.
        replica_id: random per start of a process.
        stale_ok_s, window_s, lease_s, answer_s: as for the limiter.
    """

    def __init__(
        self,
        database: Database,
        replica_id: UUID,
        *,
        stale_ok_s: float,
        window_s: float = WINDOW_S,
        lease_s: float = LEASE_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._database = database
        self._replica_id = replica_id
        self._answer_s = answer_s
        self._fixed = {
            "replica_id": replica_id,
            "stale_ok_s": stale_ok_s,
            "window_s": window_s,
            "lease_s": lease_s,
            "slack_s": answer_s,
        }
        self._claim_no = 0
        self._connection: Connection | None = None
        self._given_up: set[asyncio.Task[Any]] = set()
        # A moment of the ledger's clock, how often that was set, and when it was asked for on the own one.
        self._seen: tuple[datetime | None, int | None, float] = (None, None, 0.0)
        self._watched_from = 0.0

    async def exchange(self, claims: Sequence[Claim], spare: Sequence[UUID]) -> Mapping[UUID, Grant | None]:
        self._claim_no += 1
        sent_at = time.monotonic()
        seen, step, asked_at = self._seen
        values = {
            **self._fixed,
            "claim_no": self._claim_no,
            "claims": json.dumps([asdict(claim) for claim in claims], default=str),
            "spare": list(spare),
            "seen": seen,
            "step": step,
            "elapsed_s": sent_at - asked_at,
            "watched_s": sent_at - self._watched_from,
        }
        asked = asyncio.create_task(self._ask(values))
        try:
            await asyncio.wait({asked}, timeout=self._answer_s)
            # Looked at even if the answer is there: a process that was stopped meanwhile has it late.
            if not asked.done() or time.monotonic() - sent_at > self._answer_s:
                log.warning("ledger_unreachable", waited_s=self._answer_s)
                raise Unavailable("the registry can't be reached")
        except BaseException:
            self._given_up.add(asked)
            asked.add_done_callback(self._ended)
            asked.cancel()
            raise
        rows = asked.result()
        if rows and rows[-1]["product_id"] is None:
            moment = rows.pop()
            if moment["step"] != step:
                self._watched_from = time.monotonic()
            self._seen = (moment["at"], moment["step"], sent_at)
        return {row["product_id"]: _grant(row) for row in rows}

    async def leave(self) -> None:
        async with self._database.connection() as connection:
            await connection.execute(_SQL["leave"], {"replica_id": self._replica_id})

    async def close(self) -> None:
        for asked in self._given_up:
            # The second time, the driver no longer waits for the database.
            asked.cancel()
        if self._given_up:
            await asyncio.wait(self._given_up)
        if self._connection is not None:
            await self._connection.close()

    async def _ask(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        connection, self._connection = self._connection, None
        try:
            with translated():
                if connection is None:
                    # Not carried out long after it was given up.
                    connection = await self._database.connect(statement_ms=int(self._answer_s * 1000))
                cursor = await connection.execute(_SQL["claim_shares"], values)
                rows = await cursor.fetchall()
        except BaseException:
            if connection is not None:
                await connection.close()
            raise
        self._connection = connection
        return rows

    def _ended(self, asked: "asyncio.Task[list[dict[str, Any]]]") -> None:
        self._given_up.discard(asked)
        if not asked.cancelled():
            # Looked at, or it is reported as forgotten.
            asked.exception()


def _grant(row: dict[str, Any]) -> Grant | None:
    if row["cap"] is None:
        return None
    return Grant(row["granted"], row["cap"], row["keep"], row["reclaimable"], row["wait_s"])
