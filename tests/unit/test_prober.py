"""When silence is the prober's own."""

import pytest

from services.provisioner.domain.health import prober_is_ill


@pytest.mark.parametrize(
    ("silent", "probed", "ill"),
    [
        (0, 0, False),
        (1, 1, False),  # One engine alone says nothing of the others.
        (1, 2, False),
        (2, 2, True),
        (2, 6, True),
        (3, 10, False),  # No more than 30%.
        (4, 10, True),
        (300, 1000, False),
        (301, 1000, True),
    ],
)
def test_more_than_thirty_percent_are_the_probers_fault(silent: int, probed: int, ill: bool) -> None:
    assert prober_is_ill(silent, probed) is ill
