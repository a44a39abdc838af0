"""The score card: what the chaos suite measures, beside what was promised.

Plain `pytest` runs the suite's short form. `--full` runs it whole, with three seeds, and if every
figure was measured writes the card into docs/reliability.md, and what failed. `--seed N` replays one seed.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from tests.harness import ROOT

FIGURES = {
    "kill -9 at every failpoint, of each process and of dockerd": "all survived",
    "convergence after a kill, p99": "one reconcile period + 5 s",
    "containers, volumes, ports left over after 1,000 chaotic lives": "0, 0, 0",
    "acknowledged operations lost; volumes lost": "0; 0",
    "duplicate engines, 1,000 users × 8 replicas": "0",
    "samples above `max_engines`": "0",
    "over-admits, 8 replicas, any 60 s, clocks ±1 h": "0",
    "under-admission at saturation": "≤ 1%",
    "requests failed in 100 rolling restarts": "0",
    "duplicate effects in 10,000 ambiguous replies": "0",
    "wrong-tenant 200s; warm double claims; hangs in 10,000 sleep/admit races": "0; 0; 0",
    "PostgreSQL restart: recovery; requests past their deadline": "≤ 5 s; 0",
    "PostgreSQL gone for 5 min: admits of running engines that fail": "0",
    "dockerd stopped: change of admit p99": "< 10%",
    "malformed inputs tried; 5xx or hangs": "≥ 100,000; 0",
    "authorization matrix cells right; canary secrets found": "100%; 0",
}
"""Every figure, with its target."""

SEEDS = (1, 2, 3)
_DOCUMENT = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- score card: written by `make chaos` -->", "<!-- end of the score card -->"

Score = Callable[[str, str, bool], None]


class _Measured(NamedTuple):
    value: str
    met: bool


_measured: defaultdict[str, list[_Measured]] = defaultdict(list)
# Tests that failed or were skipped: what they were to measure beside the figures is not shown.
_silent: dict[str, None] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption("--full", action="store_true", help="the chaos suite whole, with three seeds")
    group.addoption("--seed", type=int, help="the chaos suite with this seed alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Tests elsewhere may have seeds of their own.
    own = any(mark.args[0] == "seed" for mark in metafunc.definition.iter_markers("parametrize"))
    if "seed" in metafunc.fixturenames and not own:
        one = metafunc.config.option.seed
        seeds = SEEDS if metafunc.config.option.full else SEEDS[:1]
        metafunc.parametrize("seed", seeds if one is None else [one], ids=lambda seed: f"seed {seed}")


@pytest.fixture
def extent(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """Chooses between the short form's number and the full form's."""
    full = pytestconfig.option.full
    return lambda short, whole: whole if full else short


@pytest.fixture
def score(record_property: Callable[[str, object], None]) -> Score:
    """Notes for a figure what was measured, and whether that meets its target."""

    def score(figure: str, value: str, met: bool) -> None:
        assert figure in FIGURES
        record_property("score", (figure, value, met))

    return score


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid.startswith("tests/chaos/") and not report.passed:
        _silent[report.nodeid] = None
    if report.when == "call":
        for name, noted in report.user_properties:
            if name == "score":
                figure, value, met = cast(tuple[str, str, bool], noted)
                _measured[figure].append(_Measured(value, met and report.passed))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _measured:
        return
    terminalreporter.section("score card")
    card = [(figure, target, *_joined(_measured.get(figure, []))) for figure, target in FIGURES.items()]
    for figure, *row in card:
        # The short form of a part of the suite says nothing of the rest.
        if figure in _measured or config.option.full:
            terminalreporter.line("  |  ".join((figure, *row)))
    if _whole(config):
        _write(_DOCUMENT, card)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A target that was missed is a failure of `make chaos`; in the short form times say nothing."""
    missed = any(not met for measured in _measured.values() for _, met in measured)
    if missed and _whole(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _whole(config: pytest.Config) -> bool:
    return config.option.full and config.option.seed is None and len(_measured) == len(FIGURES)


def _joined(measured: list[_Measured]) -> tuple[str, str]:
    """What the seeds measured, and the verdict of all."""
    if not measured:
        return "", "not measured"
    values = dict.fromkeys(value for value, _ in measured)
    return " / ".join(values), "met" if all(met for _, met in measured) else "MISSED"


def _write(document: Path, card: list[tuple[str, str, str, str]]) -> None:
    before, rest = document.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in card)
    table = f"| figure | target | measured | verdict |\n|---|---|---|---|\n{rows}"
    names = ", ".join(f"`{nodeid.partition('::')[2]}`" for nodeid in _silent)
    ending = f"Failed or skipped: {names}." if names else "All tests passed."
    document.write_text(f"{before}{_BEGIN}\n\n{table}\n\n{ending}\n\n{_END}{after}")
