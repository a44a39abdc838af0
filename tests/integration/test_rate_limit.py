"""The rate limit over processes that are killed, cut off and started again: the limit holds in every window.

Windows are of two seconds here, so that many of them pass; all that is measured in windows is the same.
"""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from services.admission.ratelimit_sql import forget_replica
from services.provisioner.store.migrations import migrate
from services.shared.postgres import Database
from tests.harness import ROOT
from tests.integration.rate_limit_process import Orders

WINDOW_S = 2.0
LEASE_S = 0.05
ANSWER_S = 0.2
LIMIT = 200


class Replica:
    """A process of `rate_limit_process`."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.rate_limit_process", json.dumps(asdict(orders))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serving(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "admits\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def leave(self) -> float:
        """Ends it orderly; returns the longest time in seconds that a call of its took."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return float(out)

    def admits(self) -> list[float]:
        log = Path(self.orders.log)
        data = log.read_bytes() if log.exists() else b""
        return [moment for (moment,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]


class Field:
    """A product with a limit, and the replicas that admit to it."""

    def __init__(self, url: str, directory: Path, limit: int) -> None:
        self.url = url
        self.directory = directory
        self.limit = limit
        self.product_id = uuid4()
        self.replicas: list[Replica] = []
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO products (product_id, slug, max_engines, rate_limit_rpm, allowed_images)"
                " VALUES (%s, %s, 1, %s, '{}')",
                [self.product_id, str(self.product_id), limit],
            )
            connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [self.product_id])

    def start(self, url: str | None = None, *, callers: int = 8, pause_s: float = 0.01) -> Replica:
        log = str(self.directory / f"admits-{len(self.replicas)}")
        times = {"window_s": WINDOW_S, "lease_s": LEASE_S, "answer_s": ANSWER_S, "stale_ok_s": 60.0}
        orders = Orders(
            url or self.url,
            str(uuid4()),
            str(self.product_id),
            self.limit,
            log,
            callers=callers,
            pause_s=pause_s,
            **times,
        )
        self.replicas.append(Replica(orders))
        self.replicas[-1].serving()
        return self.replicas[-1]

    def admits(self) -> list[float]:
        return sorted(moment for replica in self.replicas for moment in replica.admits())

    def used(self, since: float, until: float) -> float:
        """Which part of what the limit allows in that time was admitted."""
        n = sum(since <= moment < until for moment in self.admits())
        return n / (self.limit * (until - since) / WINDOW_S)

    def check(self) -> None:
        """In no window more than the limit: any admit and that one `limit` later are a window apart."""
        admits = self.admits()
        assert len(admits) > self.limit
        apart = [later - earlier for earlier, later in zip(admits, admits[self.limit :], strict=False)]
        assert min(apart) >= WINDOW_S


@pytest.fixture
async def field(database_url: str, tmp_path: Path) -> AsyncIterator[Field]:
    await migrate(database_url)
    field = Field(database_url, tmp_path, LIMIT)
    yield field
    for replica in field.replicas:
        replica.kill()


async def test_at_saturation_the_limit_is_used_and_never_exceeded(field: Field) -> None:
    for _ in range(4):
        field.start()
    begun = time.monotonic()
    await asyncio.sleep(12)
    until = time.monotonic()
    for replica in field.replicas:
        replica.leave()
    print("used", field.used(begun, until), [len(r.admits()) for r in field.replicas])
    field.check()
