"""What notifications cost those who are admitted: their p99 while changes are noted, with notifications and without."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg

from bench.installation import Installation
from bench.loads import h2load
from bench.round_trips import RATE_S

CHANGES_S = 200


def measure(subject: Installation, rounds: int, duration_s: float) -> dict[str, list[float]]:
    """Milliseconds of each round, `notified` and `mute`, in turns.

    Args:
        subject: whose Admission is called, by gRPC, and whose engines change.
        duration_s: seconds of one run.
    """
    [(notifying,)] = subject.platform.query("SELECT pg_get_functiondef('note_change'::regproc)")
    p99s: dict[str, list[float]] = {"notified": [], "mute": []}
    for _ in range(rounds):
        for way, found in p99s.items():
            if way == "mute":
                subject.platform.lose_notifications()
            with _changes(subject):
                calls = subject.grpc_calls(subject.admission.address)
                load = h2load(calls, concurrency=64, duration_s=duration_s, rate_s=RATE_S, latency=True)
            found.append(load.percentiles_ms["99"])
            subject.platform.query(notifying)
    return p99s


@contextmanager
def _changes(subject: Installation) -> Iterator[None]:
    """Within the block engines that are admitted change, each in a transaction of its own."""
    ended = threading.Event()

    def change() -> None:
        with psycopg.connect(subject.platform.database_url, autocommit=True) as connection:
            due = time.monotonic()
            while not ended.wait(max(due - time.monotonic(), 0)):
                due += 1 / CHANGES_S
                product, user_id = subject.anybody()
                # Another port: the answer remains as long as it was.
                connection.execute(
                    "UPDATE engines SET url = 'http://127.0.0.1:' || 30000 + trunc(random() * 10000)"
                    " WHERE product_id = %s AND user_id = %s",
                    [product.product_id, user_id],
                )

    with ThreadPoolExecutor() as threads:
        changing = threads.submit(change)
        try:
            yield
        finally:
            ended.set()
        changing.result()
