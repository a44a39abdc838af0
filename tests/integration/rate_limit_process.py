"""A replica's limiter as a process of its own, hammered: `python -m tests.integration.rate_limit_process`.

It is told what to do by a JSON object as its argument (`Orders`), runs until it is killed, or
leaves on SIGTERM, and logs the moment of every admit on the machine's monotonic clock. Its last words are for how many
seconds a call has waited at most, and what time it is.
"""

import asyncio
import json
import os
import signal
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from services.admission.domain import Product
from services.admission.ratelimit import LeasedLimiter
from services.admission.ratelimit_share import Share
from services.admission.ratelimit_sql import SqlLedger
from services.shared.errors import RateLimited, Unavailable
from services.shared.postgres import Database


@dataclass(frozen=True)
class Orders:
    """Seconds, where it isn't said: `pause_s` between two calls of one of `callers`, which is their pace."""

    url: str
    replica_id: str
    product_id: str
    limit: int
    log: str
    window_s: float
    lease_s: float
    answer_s: float
    stale_ok_s: float
    callers: int
    pause_s: float


def _log_admits(path: str) -> None:
    """Has every token that is taken logged with the moment that the limiter itself took it at."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    take = Share.take

    def logged(share: Share, now: float) -> bool:
        taken = take(share, now)
        if taken:
            os.write(log, struct.pack("d", now))
        return taken

    Share.take = logged  # type: ignore[assignment,method-assign]


async def main(orders: Orders) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    replica_id = UUID(orders.replica_id)
    database = Database(orders.url, application_name=f"limiter-{replica_id}")
    await database.open()
    times: dict[str, Any] = {
        "stale_ok_s": orders.stale_ok_s,
        "window_s": orders.window_s,
        "lease_s": orders.lease_s,
        "answer_s": orders.answer_s,
    }
    ledger = SqlLedger(database, replica_id, **times)
    limiter = LeasedLimiter(ledger, **times)
    product = Product(UUID(orders.product_id), orders.limit, 0)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    waits = 0.0

    async def call() -> None:
        nonlocal waits
        while not stop.is_set():
            begun = time.monotonic()
            with suppress(RateLimited, Unavailable):
                if not limiter.take_now(product):
                    await limiter.take(product)
            waits = max(waits, time.monotonic() - begun)
            await asyncio.sleep(orders.pause_s)

    print("admits", flush=True)
    running = asyncio.create_task(limiter.run())
    await asyncio.gather(*(call() for _ in range(orders.callers)))
    running.cancel()
    await asyncio.wait([running])
    await limiter.close()
    await ledger.close()
    await database.close()
    print(waits, time.time(), flush=True)


if __name__ == "__main__":
    _orders = Orders(**json.loads(sys.argv[1]))
    _log_admits(_orders.log)
    asyncio.run(main(_orders))
