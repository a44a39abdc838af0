"""What `make bench` says of what it measured: verdicts, and answers that don't count."""

import pytest

from bench.figures import Figure, ratio_figure
from bench.loads import Call, WrongAnswers, framed, read_h2load

CALL = Call("127.0.0.1:1", ["/"], {}, framed(b""), answer_bytes=25)
OUTPUT = """
finished in 2.00s, 1000.50 req/s, 82.35KB/s
requests: 2001 total, 2001 started, 2001 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
traffic: 160.80KB (164667) total, 10.24KB (10490) headers (space savings 95.00%), 48.85KB ({data}) data
"""


def output(succeeded: int = 2001, failed: int = 0, data: int = 2001 * 25) -> str:
    return OUTPUT.format(succeeded=succeeded, failed=failed, data=data)


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        (0.85, True, "met"),
        (0.80, True, "missed by 6%"),
        (0.8499, True, "missed by 1%"),
        (0.9, False, "missed by 6%"),
        (0.5, False, "met"),
        (None, True, "not measured"),
    ],
)
def test_a_target_is_met_or_missed_by_so_much(value: float | None, at_least: bool, verdict: str) -> None:
    assert Figure("", 0.85, at_least, "", value, "").verdict == verdict


def test_ratios_are_of_runs_beside_each_other() -> None:
    """In the third round both are slower: the machine was, not we."""
    figure = ratio_figure("", 1, "", {"a": [50, 60, 10], "b": [100, 100, 20]}, "a", "b")
    assert figure.value == 0.5


def test_right_answers_are_counted() -> None:
    assert read_h2load(CALL, output()) == 1000.5


@pytest.mark.parametrize("bad", [output(failed=1), output(data=0), output(data=1500 * 25), "h2load: cannot connect"])
def test_what_was_not_answered_rightly_is_no_result(bad: str) -> None:
    with pytest.raises(WrongAnswers):
        read_h2load(CALL, bad)
