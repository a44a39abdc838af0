"""How much is measured."""

from dataclasses import dataclass
from pathlib import Path

from tests.harness import ROOT


@dataclass(frozen=True)
class Plan:
    """How much is done; seconds are of one run.

    Args:
        rounds: in each of which everything that is compared runs once.
        sizes: engines in the registry.
        staleness_rounds: of every change, with notifications and without; 0 for none.
        new_users: admitted for the first time.
        cold_pairs: of an engine made by the platform and one made without it.
        spawns: of servers by JupyterHub.
    """

    directory: Path
    rounds: int
    seconds: float
    curve_seconds: float
    concurrencies: tuple[int, ...]
    paced_seconds: float
    sizes: tuple[int, ...]
    round_trip_seconds: float
    staleness_rounds: int
    new_users: int
    cold_pairs: int
    spawns: int


FULL = Plan(
    directory=ROOT / "docs" / "benchmarks",
    rounds=5,
    seconds=2,
    curve_seconds=2,
    concurrencies=(1, 4, 16, 64, 256),
    paced_seconds=3,
    sizes=(1_000, 10_000, 100_000, 1_000_000),
    round_trip_seconds=20,
    staleness_rounds=3,
    new_users=60,
    cold_pairs=15,
    spawns=5,
)
QUICK = Plan(
    directory=ROOT / "build" / "benchmarks",
    rounds=1,
    seconds=1,
    curve_seconds=1,
    concurrencies=(1, 256),
    paced_seconds=1,
    sizes=(10_000, 100_000),
    round_trip_seconds=2,
    staleness_rounds=0,
    new_users=3,
    cold_pairs=1,
    spawns=2,
)
