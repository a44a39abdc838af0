"""The score card: what the chaos suite measures, beside what was promised.

Plain `pytest` runs the suite's short form. `--full` runs it whole, with three seeds, and writes the card
into docs/reliability.md, and what failed. `--seed N` replays one seed.

A test is marked with the figures that it contributes to, and unless all of a figure's pass it is not met.
"""

from collections import Counter, defaultdict
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
    test: str
    value: str
    met: bool


_measured: defaultdict[str, list[_Measured]] = defaultdict(list)
# Whether all tests of a figure have passed so far.
_passed: dict[str, bool] = {}
# Tests that failed or were skipped.
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What the processes of a parallel run report of a test is made of its properties alone.
    for item in items:
        for mark in item.iter_markers("figure"):
            assert mark.args[0] in FIGURES
            item.user_properties.append(("figure", mark.args[0]))


@pytest.fixture
def score(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Score:
    """Notes what was measured for a figure that the test is marked with, and whether that meets its target."""

    def score(figure: str, value: str, met: bool) -> None:
        assert ("figure", figure) in request.node.user_properties
        record_property("score", (figure, value, met))

    return score


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid.startswith("tests/chaos/") and not report.passed:
        _silent[report.nodeid] = None
    for name, noted in report.user_properties:
        if name == "figure":
            figure = cast(str, noted)
            _passed[figure] = _passed.get(figure, True) and report.passed
        elif report.when == "call":
            figure, value, met = cast(tuple[str, str, bool], noted)
            _measured[figure].append(_Measured(report.nodeid, value, met))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _passed:
        return
    terminalreporter.section("score card")
    card = [(figure, target, *_judged(figure)) for figure, target in FIGURES.items()]
    for figure, *row in card:
        # The short form of a part of the suite says nothing of the rest.
        if figure in _passed or config.option.full:
            terminalreporter.line("  |  ".join((figure, *row)))
    if _whole(config):
        _write(_DOCUMENT, card)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A target that was missed is a failure of `make chaos`; in the short form times say nothing."""
    missed = any(_judged(figure)[1] != "met" for figure in FIGURES)
    if missed and _whole(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _whole(config: pytest.Config) -> bool:
    return config.option.full and config.option.seed is None and len(_passed) == len(FIGURES)


def _judged(figure: str) -> tuple[str, str]:
    """What the tests measured, and the verdict of all."""
    measured = sorted(_measured[figure])
    if not measured:
        return "", "not measured"
    times = Counter(one.value for one in measured)
    said = (value if count == 1 else f"{count} times {value}" for value, count in times.items())
    return " / ".join(said), "met" if _passed[figure] and all(one.met for one in measured) else "MISSED"


def _write(document: Path, card: list[tuple[str, str, str, str]]) -> None:
    before, rest = document.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in card)
    table = f"| figure | target | measured | verdict |\n|---|---|---|---|\n{rows}"
    names = ", ".join(f"`{nodeid.partition('::')[2]}`" for nodeid in _silent)
    ending = f"Failed or skipped: {names}." if names else "All tests passed."
    document.write_text(f"{before}{_BEGIN}\n\n{table}\n\n{ending}\n\n{_END}{after}")
