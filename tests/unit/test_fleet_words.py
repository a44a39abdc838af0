"""What the fleet's answers say: health, an engine's state in words, and the tokens of pages."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.fleet import EngineReport, FleetHealth, FleetStatus, summarize
from services.provisioner.domain.paging import page_key, page_limit, page_token
from services.shared.errors import InvalidRequest


@pytest.mark.parametrize(
    ("failed", "others", "health"),
    [
        (0, 0, FleetHealth.OK),
        (0, 10, FleetHealth.OK),
        (1, 99, FleetHealth.DEGRADED),
        (1, 4, FleetHealth.DEGRADED),
        (2, 7, FleetHealth.CRITICAL),
        (200_001, 799_999, FleetHealth.CRITICAL),
        (1, 0, FleetHealth.CRITICAL),
    ],
)
def test_more_than_a_fifth_failed_is_critical(failed: int, others: int, health: FleetHealth) -> None:
    counts = dict.fromkeys(EngineStatus, 0) | {EngineStatus.FAILED: failed, EngineStatus.RUNNING: others}
    status = FleetStatus(counts, warm_pool=None)
    assert (status.total, status.unhealthy, status.health) == (failed + others, failed, health)


def at(minute: int) -> datetime:
    return datetime(2030, 1, 2, 3, minute, tzinfo=UTC)


RUNNING = EngineReport(
    status=EngineStatus.RUNNING,
    status_since=at(0),
    status_reason=None,
    deep_asleep=False,
    busy_at=None,
    busy_reason=None,
    restart_attempts=0,
    restart_at=None,
    idle_sleep_after_s=900,
    last_admit_at=None,
    keep_awake_until=None,
    operation=None,
    step=None,
    operation_since=None,
    quarantined=False,
    status_by=None,
)
ASLEEP = replace(RUNNING, status=EngineStatus.SLEEPING, status_by="system")
FAILED = replace(RUNNING, status=EngineStatus.FAILED, status_reason="3 probes in a row went unanswered")


@pytest.mark.parametrize(
    ("report", "summary"),
    [
        (RUNNING, "running since 2030-01-02T03:00:00Z"),
        (
            replace(RUNNING, last_admit_at=at(1), keep_awake_until=at(2), busy_at=at(3), busy_reason="it said so"),
            "running since 2030-01-02T03:00:00Z; last at work 2030-01-02T03:03:00Z: it said so;"
            " last admit 2030-01-02T03:01:00Z; kept awake until 2030-01-02T03:02:00Z",
        ),
        (
            replace(ASLEEP, last_admit_at=at(1)),
            "asleep since 2030-01-02T03:00:00Z, idle for more than the 900 s of its policy;"
            " last admit 2030-01-02T03:01:00Z",
        ),
        (
            replace(ASLEEP, deep_asleep=True, status_by="product:demo"),
            "deeply asleep since 2030-01-02T03:00:00Z by product:demo",
        ),
        (
            replace(ASLEEP, idle_sleep_after_s=None),
            "asleep since 2030-01-02T03:00:00Z by system",
        ),
        (
            replace(ASLEEP, operation="sleep", step="announced", operation_since=at(0)),
            "going to sleep (announced) since 2030-01-02T03:00:00Z",
        ),
        (
            replace(ASLEEP, status_by="product:demo", operation="wake", step="probing", operation_since=at(4)),
            "asleep since 2030-01-02T03:00:00Z by product:demo; waking up (probing) since 2030-01-02T03:04:00Z",
        ),
        (
            replace(RUNNING, status=EngineStatus.STOPPED, status_by="product:demo"),
            "stopped since 2030-01-02T03:00:00Z by product:demo",
        ),
        (
            replace(FAILED, restart_attempts=2, restart_at=at(5)),
            "failed since 2030-01-02T03:00:00Z: 3 probes in a row went unanswered;"
            " restart 3 of 8 due at 2030-01-02T03:05:00Z",
        ),
        (
            replace(FAILED, restart_attempts=8),
            "failed since 2030-01-02T03:00:00Z: 3 probes in a row went unanswered; given up after 8 restarts",
        ),
        (
            replace(FAILED, status_reason=None),
            "failed since 2030-01-02T03:00:00Z; no restart is due",
        ),
        (
            replace(
                RUNNING, status=EngineStatus.PROVISIONING, operation="provision", step="starting", operation_since=at(0)
            ),
            "booting (starting) since 2030-01-02T03:00:00Z",
        ),
        (
            replace(
                RUNNING,
                status=EngineStatus.DESTROYING,
                operation="destroy",
                step="removing",
                operation_since=at(6),
                quarantined=True,
            ),
            "being destroyed (removing) since 2030-01-02T03:06:00Z; it could not be done and waits for an operator",
        ),
    ],
)
def test_an_engines_state_is_told_with_its_cause(report: EngineReport, summary: str) -> None:
    assert summarize(report, restart_max_attempts=8) == summary


@given(st.text(min_size=1))
def test_a_token_leads_back_to_its_key(key: str) -> None:
    token = page_token(key)
    assert page_key(token, str) == key
    assert all(c.isascii() and (c.isalnum() or c in "-_") for c in token)


@given(st.text(min_size=1))
def test_any_text_is_a_token_or_refused(token: str) -> None:
    try:
        key = page_key(token, int)
    except InvalidRequest:
        return
    assert key is not None


@pytest.mark.parametrize("limit", [0, -1, 1001, 2**31 - 1])
def test_a_limit_out_of_bounds_is_refused_by_name(limit: int) -> None:
    with pytest.raises(InvalidRequest, match=r"^limit: "):
        page_limit(limit)


def test_limits_within_bounds_are_taken() -> None:
    assert [page_limit(limit) for limit in (None, 1, 1000)] == [100, 1, 1000]
