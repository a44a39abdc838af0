import pytest

from services.admission.workers import nth_address


@pytest.mark.parametrize(
    ("address", "n", "nth"),
    [
        ("127.0.0.1:9464", 0, "127.0.0.1:9464"),
        ("127.0.0.1:9464", 3, "127.0.0.1:9467"),
        ("[::1]:9464", 1, "[::1]:9465"),
        ("127.0.0.1:0", 1, "127.0.0.1:0"),
        (None, 1, None),
    ],
)
def test_workers_serve_their_metrics_on_ports_in_a_row(address: str | None, n: int, nth: str | None) -> None:
    assert nth_address(address, n) == nth
