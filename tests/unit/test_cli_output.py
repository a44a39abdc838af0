"""What commands print, apart from where it came from."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from september.engine.v1.engine_pb2 import Engine
from september.errors.v1 import errors_pb2
from september.provisioner.v1.fleet_pb2 import EngineSummary
from september.provisioner.v1.fleet_service_pb2 import GetFleetStatusResponse, ListEnginesResponse
from september.provisioner.v1.product_service_pb2 import GetProductResponse
from services.cli.command import exit_code
from services.cli.output import Output, relative
from services.shared.errors import RemoteError

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "now"), (0.4, "now"), (1, "1 s ago"), (59, "59 s ago"), (60, "1 min ago"), (3599, "59 min ago"),
        (3600, "1 h ago"), (86_399, "23 h ago"), (86_400, "1 d ago"), (40 * 86_400, "40 d ago"),
        (-1, "in 1 s"), (-90, "in 1 min"), (-7200, "in 2 h"),
    ],
)  # fmt: skip
def test_times_are_said_in_the_largest_unit_that_fits(seconds: float, said: str) -> None:
    assert relative(NOW - timedelta(seconds=seconds), NOW) == said


def test_every_code_of_the_error_table_has_its_exit_code() -> None:
    codes = [value.name.removeprefix("ERROR_CODE_") for value in errors_pb2.ErrorCode.DESCRIPTOR.values if value.number]
    assert {code: exit_code(code) for code in codes} == {
        "INVALID_REQUEST": 2,
        "INVALID_PLATFORM_KEY": 8,
        "INVALID_ADMIN_KEY": 8,
        "POLICY_DENIED": 8,
        "ENGINE_NOT_FOUND": 4,
        "PRODUCT_NOT_FOUND": 4,
        "ROUTE_NOT_FOUND": 4,
        "ENGINE_ALREADY_EXISTS": 5,
        "PRODUCT_SLUG_EXISTS": 5,
        "ENGINE_NOT_RUNNING": 5,
        "ENGINE_ALREADY_RUNNING": 5,
        "IDEMPOTENCY_CONFLICT": 5,
        "RATE_LIMITED": 6,
        "QUOTA_EXCEEDED": 6,
        "INTERNAL": 1,
        "BACKEND_ERROR": 1,
        "PORT_EXHAUSTION": 7,
        "UNAVAILABLE": 7,
        "BOOT_TIMEOUT": 7,
    }
    assert exit_code("OF_A_LATER_VERSION") == 1


def test_json_names_all_that_is_not_absent_in_one_order(capsys: pytest.CaptureFixture[str]) -> None:
    full = GetFleetStatusResponse(
        total=2, by_status={"running": 1, "failed": 1}, health=GetFleetStatusResponse.degraded, unhealthy_count=1
    )
    for answer in (full, GetFleetStatusResponse()):
        Output(as_json=True).record(answer)
    first, second = capsys.readouterr().out.split("\n}\n")[:2]
    assert json.loads(first + "}") == {
        "total": 2, "by_status": {"failed": 1, "running": 1}, "health": "degraded", "unhealthy_count": 1,
    }  # fmt: skip
    assert list(json.loads(first + "}")) == list(json.loads(second + "}"))


def test_lines_in_a_pipe_hold_every_field_between_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EngineSummary(user_id="ada", status=Engine.Status.running)
    engine.created_at.FromJsonString("2026-05-01T10:00:00Z")
    answer = ListEnginesResponse(engines=[engine])
    Output(as_json=False).table(answer, answer.engines, "user_id", "status", "last_health_at", "created_at")
    assert capsys.readouterr().out == "ada\trunning\t\t2026-05-01T10:00:00Z\n"


def test_what_others_chose_can_not_forge_lines_or_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = EngineSummary(user_id="a\tb\nc\x1b[2J\x9b\u2028d", url="[red]x[/]")
    Output(as_json=False).rows([hostile], "user_id", "url")
    assert capsys.readouterr().out == "a b c [2J  d\t[red]x[/]\n"
    Output(as_json=False).error(RemoteError("INTERNAL", "a\nb\x1b"), None)
    assert capsys.readouterr().err == "INTERNAL: a b \n"


def test_fields_of_inner_messages_are_shown_and_absent_ones_are_empty(capsys: pytest.CaptureFixture[str]) -> None:
    answer = GetProductResponse()
    answer.product.policy.max_engines = 5
    answer.product.policy.allowed_images.extend(["a:*", "b"])
    fields = "product.policy.max_engines", "product.policy.rate_limit_rpm", "product.policy.allowed_images"
    Output(as_json=False).record(answer, *fields, "product.disabled_at")
    assert capsys.readouterr().out == "max_engines\t5\nrate_limit_rpm\t\nallowed_images\ta:*, b\ndisabled_at\t\n"


def test_what_only_later_versions_know_is_shown_by_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    later = EngineSummary.FromString(b"\x18\x63")
    Output(as_json=False).rows([later], "status")
    Output(as_json=True).event(later)
    plain, document = capsys.readouterr().out.splitlines()
    assert (plain, json.loads(document)["status"]) == ("99", 99)


def test_an_error_says_when_to_try_again_before_any_other_hint(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.error(RemoteError("RATE_LIMITED", "too fast", retry_after_s=11.2), "a hint")
    output.error(RemoteError("QUOTA_EXCEEDED", "too many"), "a hint")
    output.error(RemoteError("INTERNAL", "a bug"), None)
    assert capsys.readouterr().err.splitlines() == [
        "RATE_LIMITED: too fast; try again in 12 s",
        "QUOTA_EXCEEDED: too many; a hint",
        "INTERNAL: a bug",
    ]


def test_an_error_in_json_is_the_envelope_of_rest(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).error(RemoteError("RATE_LIMITED", "too “fast”", retry_after_s=11.2), "a hint")
    assert json.loads(capsys.readouterr().err) == {"error": {"code": "RATE_LIMITED", "message": "too “fast”"}}
