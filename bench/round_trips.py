"""How often an admit asks PostgreSQL, counted by PostgreSQL."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from bench.installation import Installation
from bench.loads import h2load

RATE_S = 1000
_ROLE = "bench_admission"
_IDLE_S = 2.0
# One line for each: of a statement sent as three messages, that of its execution.
_EXECUTED = re.compile(r"duration: .* ms  (statement|execute )")


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Args:
    per_admit: statements in all, divided by the admits meanwhile.
    idle_s: statements a second while nobody calls.
    """

    per_admit: float
    idle_s: float


def count(subject: Installation, server_log: Path, duration_s: float) -> RoundTrips:
    """Starts an Admission as a role of its own, whose statements are logged, and calls it as one product.

    Args:
        server_log: PostgreSQL's log.
        duration_s: how long it is called, in seconds.
    """
    subject.platform.query(f"CREATE ROLE {_ROLE} SUPERUSER LOGIN")
    subject.platform.query(f"ALTER ROLE {_ROLE} SET log_min_duration_statement = 0")
    url = urlsplit(subject.platform.database_url)
    as_role = urlunsplit(url._replace(netloc=f"{_ROLE}@{url.netloc.rpartition('@')[2]}"))
    admission = subject.platform.admission(subject.provisioner, ORCH_DATABASE_URL=as_role)
    try:
        calls = subject.grpc_calls(admission.address, products=[0] * 8)
        begin = _executed(server_log)
        time.sleep(_IDLE_S)
        idle = _executed(server_log) - begin
        load = h2load(calls, concurrency=64, duration_s=duration_s, rate_s=RATE_S)
        loaded = _executed(server_log) - begin - idle
    finally:
        admission.terminate()
    return RoundTrips(loaded / (load.requests_s * duration_s), idle / _IDLE_S)


def _executed(server_log: Path) -> int:
    with server_log.open(errors="replace") as lines:
        return sum(1 for line in lines if _EXECUTED.search(line))
