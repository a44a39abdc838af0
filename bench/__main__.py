"""`make bench`: the table of what the platform promises to reach, measured beside its references.

`python -m bench [--quick] [--peer jupyterhub]`: quick runs are short and write to `build/benchmarks`,
the others to `docs/benchmarks`. Load generators, PostgreSQL, Envoy and services share the machine's
cores, so numbers say little and ratios much; what is compared runs in turns.
"""

import argparse
import dataclasses
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench import cold, containers, figures, first_admits, notifications, plots, report, round_trips, staleness
from bench.contenders import (
    ADMIT,
    DIRECT,
    FAST_GRPC,
    FAST_REST,
    NO_OP,
    ONE_PROCESS,
    Contender,
    contenders,
    rest_admits,
)
from bench.figures import Figure
from bench.installation import MOST_ACTIVE, installation
from bench.loads import WrongAnswers
from bench.peers import jupyterhub
from bench.plan import FULL, QUICK, Plan
from services.cli import gateway
from services.cli.gateway import Lane
from services.provisioner.settings import BackendKind
from services.shared import embedded_postgres
from tests.harness import new_database

CONCURRENCY = 64
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LATENCY_OF = (NO_OP, ADMIT, FAST_GRPC, FAST_REST)
_CURVES_OF = (NO_OP, ADMIT, FAST_GRPC, FAST_REST, DIRECT, ONE_PROCESS)

Rates = dict[str, list[float]]
_console = Console(stderr=True)
_begun = time.monotonic()


def announce(step: str) -> None:
    _console.print(f"{time.monotonic() - _begun:4.0f} s  {step}", highlight=False)


def throughput(answering: dict[str, Contender], plan: Plan) -> tuple[Rates, Rates]:
    """Calls a second, and the microseconds of processors that each cost those who answer."""
    rates: Rates = {name: [] for name in answering}
    costs: Rates = {name: [] for name in answering}
    for _ in range(plan.rounds):
        for name, contender in answering.items():
            before_s = contender.server.processor_s()
            rate = contender.saturate(CONCURRENCY, plan.seconds).requests_s
            rates[name].append(rate)
            costs[name].append((contender.server.processor_s() - before_s) / (rate * plan.seconds) * 1e6)
    return rates, costs


def curves(answering: dict[str, Contender], plan: Plan) -> dict[str, dict[int, float]]:
    return {
        name: {
            concurrency: contender.saturate(concurrency, plan.curve_seconds).requests_s
            for concurrency in plan.concurrencies
        }
        for name, contender in answering.items()
        if name in _CURVES_OF
    }


def latencies(answering: dict[str, Contender], rates: Rates, plan: Plan) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds at half of saturation, each the median of the rounds."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in _LATENCY_OF if name in answering}
    for _ in range(plan.rounds):
        for name, found in runs.items():
            half = statistics.median(rates[name]) / 2
            found.append(answering[name].paced(half, plan.paced_seconds).percentiles_ms)
    return {
        name: {percentile: statistics.median(run[percentile] for run in found) for percentile in found[0]}
        for name, found in runs.items()
    }


def by_registry_size(subjects: dict[int, Contender], plan: Plan) -> dict[int, list[float]]:
    rates: dict[int, list[float]] = {size: [] for size in subjects}
    for _ in range(plan.rounds):
        for size, contender in subjects.items():
            rates[size].append(contender.saturate(CONCURRENCY, plan.seconds).requests_s)
    return rates


def measure(server: str, server_log: Path, directory: Path, plan: Plan) -> tuple[list[Figure], dict[str, Any]]:
    """All of it: the table's lines, and the numbers that they were made of.

    Args:
        server: URL of PostgreSQL, in which databases are made.
        server_log: its log.
        directory: for all that the processes write.
    """
    # The lane that `september up` takes comes last.
    lanes = [Lane.GRPC] if gateway.lane_environment() is None else [Lane.GRPC, Lane.FAST]
    with ExitStack() as stack:
        announce(f"starting, with {MOST_ACTIVE:,} engines in the registry")
        subject = stack.enter_context(installation(new_database(server), directory / "main", MOST_ACTIVE))
        answering = stack.enter_context(contenders(subject, lanes, directory))
        announce("throughput")
        rates, costs = throughput(answering, plan)
        announce("throughput against concurrency")
        by_concurrency = curves(answering, plan)
        announce("latency at half of saturation")
        percentiles = latencies(answering, rates, plan)
        announce("database round trips")
        trips = round_trips.count(subject, server_log, plan.round_trip_seconds)
        announce("latency while engines change, with notifications and without")
        notified = notifications.measure(subject, plan.rounds, plan.paced_seconds)
    with ExitStack() as stack:
        announce(f"throughput with {', '.join(f'{size:,}' for size in plan.sizes)} engines in the registry")
        subjects: dict[int, Contender] = {}
        for size in plan.sizes:
            home = directory / f"{size}"
            subject = stack.enter_context(installation(new_database(server), home, size))
            subjects[size] = stack.enter_context(rest_admits(subject, lanes[-1], home))
        by_size = by_registry_size(subjects, plan)
    stale = {}
    if plan.staleness_rounds:
        announce("how soon changes are known")
        stale = staleness.measure(new_database(server), directory / "stale", plan.staleness_rounds)
    here = containers.image_is_here()
    announce("first admits of new users")
    backend = BackendKind.DOCKER if here else BackendKind.PROCESS
    firsts = first_admits.measure(new_database(server), directory / "first", plan.new_users, backend)
    announce("cold provision and wake" if here else "no image of the engine in Docker: nothing cold is measured")
    pairs = cold.measure_pairs(new_database(server), directory / "cold", plan.cold_pairs) if here else {}
    found = [
        *figures.throughput_figures(rates),
        *figures.latency_figures(percentiles),
        *figures.first_admit_figures(firsts, backend),
        *figures.cold_figures(pairs),
        figures.registry_figure(by_size),
        figures.round_trip_figure(trips),
        figures.notification_figure(notified),
        *figures.staleness_figures(stale),
    ]
    details = {
        "throughput": rates,
        "processor time, µs a call": costs,
        "throughput by concurrency": by_concurrency,
        "latency at half of saturation, ms": percentiles,
        "throughput by engines in the registry": by_size,
        "database round trips": dataclasses.asdict(trips),
        "p99 while engines change, ms": notified,
        "how soon changes are known, ms": stale,
        "first admits, ms": firsts,
        "cold": pairs,
    }
    return found, details


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--quick", action="store_true", help="short runs, written to build/benchmarks")
    parser.add_argument("--peer", choices=["jupyterhub"], help="measured besides; installed when first asked for")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    # Before anything of ours runs.
    where = report.machine()

    def ended(number: int, frame: FrameType | None) -> None:
        # Once: a second one must not keep from ending what was started.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, ended)
    with tempfile.TemporaryDirectory(prefix="september-") as name, ExitStack() as stack:
        directory = Path(name)
        # Started by root, PostgreSQL runs as another user and must get to its data.
        directory.chmod(0o755)
        data_dir = directory / "postgres"
        server = embedded_postgres.start(data_dir)
        stack.callback(embedded_postgres.stop, data_dir)
        found, details = measure(server, data_dir / "log", directory, plan)
        if arguments.peer:
            announce("JupyterHub")
            home = directory / "jupyterhub"
            try:
                details["JupyterHub"] = jupyterhub.measure(new_database(server), home, plan.seconds, plan.spawns)
            except (RuntimeError, OSError, WrongAnswers) as error:
                # It is no reason to lose what was measured before.
                announce(f"JupyterHub is not measured: {error}")
    plan.directory.mkdir(parents=True, exist_ok=True)
    plots.throughput(plan.directory / "throughput.svg", details["throughput by concurrency"])
    plots.latency(plan.directory / "latency.svg", details["latency at half of saturation, ms"])
    plots.registry(plan.directory / "registry.svg", details["throughput by engines in the registry"])
    report.write(plan.directory, where, found, details)
    report.show(found)


if __name__ == "__main__":
    main()
