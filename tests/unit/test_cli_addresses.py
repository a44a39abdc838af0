"""The addresses that `september up` is about to take."""

import socket
from collections.abc import Iterator

import pytest

from services.cli.addresses import claim, reachable
from services.cli.failure import Failure


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another one listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_taken_port_is_named_with_the_variable_that_changes_it(taken: int, host: str) -> None:
    with pytest.raises(Failure) as failure:
        claim({"ORCH_ADMISSION_LISTEN": "127.0.0.1:0", "ORCH_GATEWAY_LISTEN": f"{host}:{taken}"})
    assert str(failure.value) == f"port {taken} is taken; ORCH_GATEWAY_LISTEN chooses another one"


def test_the_same_port_twice_is_refused(taken: int) -> None:
    free = claim({"ORCH_GATEWAY_LISTEN": "127.0.0.1:0"})["ORCH_GATEWAY_LISTEN"]
    with pytest.raises(Failure, match="is taken; ORCH_ADMISSION_LISTEN"):
        claim({"ORCH_GATEWAY_LISTEN": free, "ORCH_ADMISSION_LISTEN": free})


def test_port_0_becomes_a_free_port_of_its_own_for_each() -> None:
    claimed = claim({"A": "127.0.0.1:0", "B": "0.0.0.0:0", "C": "127.0.0.1:0"})
    assert [address.rpartition(":")[0] for address in claimed.values()] == ["127.0.0.1", "0.0.0.0", "127.0.0.1"]
    ports = {int(address.rpartition(":")[2]) for address in claimed.values()}
    assert len(ports) == 3
    assert 0 not in ports
    assert claim(claimed) == claimed


def test_a_port_is_free_again_although_its_last_connection_lingers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address):
            connection, _ = listener.accept()
            connection.close()  # First, so that it is this side that waits.
    assert claim({"A": f"127.0.0.1:{address[1]}"})


@pytest.mark.parametrize("address", ["8080", ":8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"])
def test_what_is_no_address_is_refused_with_its_variable(address: str) -> None:
    with pytest.raises(Failure, match=r"ORCH_GATEWAY_LISTEN: .* must be host:port"):
        claim({"ORCH_GATEWAY_LISTEN": address})


def test_an_address_of_another_host_is_refused_with_its_variable() -> None:
    with pytest.raises(Failure, match=r"port 8080 can't be had on 192\.0\.2\.1: .*; ORCH_GATEWAY_LISTEN"):
        claim({"ORCH_GATEWAY_LISTEN": "192.0.2.1:8080"})


def test_what_listens_on_every_address_is_reached_on_this_host() -> None:
    assert reachable("0.0.0.0:8080") == "127.0.0.1:8080"
    assert reachable("10.0.0.1:8080") == "10.0.0.1:8080"
