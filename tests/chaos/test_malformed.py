"""Malformed input of every kind, in bulk: it is refused, and nothing fails, hangs, dies, grows or shows its inside."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.oracle import oracle
from tests.chaos.score_card import Score
from tests.fuzz import framing, messages, rest, wire
from tests.fuzz.targets import Tally, running_targets

FIGURE = "malformed inputs tried; 5xx or hangs"


@pytest.mark.early(145)
@pytest.mark.figure(FIGURE)
def test_malformed_input_does_no_harm(
    database_url: str, tmp_path: Path, pytestconfig: pytest.Config, extent: Callable[[int, int], int], score: Score
) -> None:
    """One run, not one for each seed: the figure is what was tried in all."""
    seed: int = pytestconfig.option.seed or 1
    number = extent(1_000, 100_000)
    tally = Tally()
    with asyncio.Runner() as runner:
        aiming = running_targets(database_url, tmp_path)
        targets = runner.run(aiming.__aenter__())
        try:
            before = targets.memory()
            # Most of what costs least, and of everything enough that all of its methods and pieces come.
            for feed, share in ((messages.feed, 16), (wire.feed, 70), (framing.feed, 15), (rest.feed, 1)):
                began, own = time.monotonic(), Tally()
                feed(runner, targets, own, number * share // 100, seed)
                print(
                    f"{feed.__module__}: {own.sent:,} sends of {len(own.inputs):,} inputs, {len(own.refused):,} of them"
                    f" refused, in {time.monotonic() - began:.0f} s, seed {seed}"
                )
                tally.add(own)
            complaints = tally.bad + targets.complaints(before)
            oracle(targets.platform)
        finally:
            runner.run(aiming.__aexit__(None, None, None))
    said = f"{tally.sent:,} sends of {len(tally.inputs):,} inputs, {len(tally.refused):,} of them refused"
    score(FIGURE, f"{said}; {len(tally.bad)}", not complaints)
    assert not complaints, "\n".join([f"{len(complaints)} complaints, seed {seed}", *complaints[:20]])
    assert tally.sent >= number
    assert len(tally.refused) > len(tally.inputs) / 2
