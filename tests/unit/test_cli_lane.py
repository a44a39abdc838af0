"""Which lane `up` takes, by what was asked for and what this Python has."""

import io

import pytest
from rich.console import Console

from services.cli import gateway
from services.cli.failure import Failure
from services.cli.gateway import Lane
from services.cli.up import possible


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(params=[{}, {"LD_PRELOAD": "/lib/libpython3.11.a"}], ids=["none", "static"])
def no_libpython(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "get_envoy_environ", lambda: request.param)


def test_nothing_asked_for_is_the_fast_lane(console: Console) -> None:
    assert possible(None, console) is Lane.FAST
    assert said(console) == ""


@pytest.mark.parametrize("lane", Lane)
def test_what_is_asked_for_is_taken(lane: Lane, console: Console) -> None:
    assert possible(lane, console) is lane


@pytest.mark.usefixtures("no_libpython")
def test_without_libpython_the_plain_lane_is_taken_and_said(console: Console) -> None:
    assert possible(None, console) is Lane.GRPC
    assert said(console) == "This Python has no libpython, so Admission runs behind the gateway: --lane grpc.\n"


@pytest.mark.usefixtures("no_libpython")
def test_without_libpython_only_the_fast_lane_is_refused(console: Console) -> None:
    assert possible(Lane.GRPC, console) is Lane.GRPC
    with pytest.raises(Failure, match="needs libpython"):
        possible(Lane.FAST, console)


@pytest.mark.parametrize(
    ("lane", "passed"),
    [
        (Lane.GRPC, {"PATH"}),
        (Lane.FAST, {"PATH", "ORCH_DATABASE_URL", "ORCH_MASTER_KEY_FILE"}),
    ],
)
def test_the_gateway_gets_the_settings_of_what_is_inside_of_it_and_no_others(lane: Lane, passed: set[str]) -> None:
    names = {"PATH", "ORCH_DATABASE_URL", "ORCH_MASTER_KEY_FILE", "ORCH_ADMIN_KEY", "ORCH_GATEWAY_LISTEN"}
    assert gateway.environment(lane, dict.fromkeys(names, "x")).keys() & names == passed
