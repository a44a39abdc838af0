"""Many engines at a glance, and one engine's state in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from services.provisioner.domain.audit import AuditEvent
from services.provisioner.domain.engine import EngineStatus


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """An engine as lists show it: without its key."""

    engine_id: UUID
    product_id: UUID
    user_id: str
    status: EngineStatus
    url: str
    image: str
    created_at: datetime
    last_health_at: datetime | None


@dataclass(frozen=True, slots=True)
class EnginePage:
    """One page of a list of engines; `total` is how many all pages have together."""

    engines: list[EngineSummary]
    total: int
    next_page_token: str | None


class FleetHealth(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class WarmPoolFill:
    """How many engines of the warm pool are ready, and how many are booting."""

    ready: int
    booting: int


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """How many engines there are in each status; the warm pool's, which are nobody's, are not among them.

    Args:
        warm_pool: how full the pool is; None for a product, which has no part in it.
    """

    by_status: Mapping[EngineStatus, int]
    warm_pool: WarmPoolFill | None

    @property
    def total(self) -> int:
        return sum(self.by_status.values())

    @property
    def unhealthy(self) -> int:
        return self.by_status[EngineStatus.FAILED]

    @property
    def health(self) -> FleetHealth:
        """Degraded with any failed engine, critical if more than a fifth has failed."""
        if not self.unhealthy:
            return FleetHealth.OK
        return FleetHealth.CRITICAL if self.unhealthy * 5 > self.total else FleetHealth.DEGRADED


@dataclass(frozen=True, slots=True)
class PastHour:
    """What happened in the past hour; `avg_boot_ms` is 0 if nothing was provisioned."""

    provisions: int
    crashes: int
    restarts: int
    avg_boot_ms: float


@dataclass(frozen=True, slots=True)
class FleetMetrics:
    past_hour: PastHour
    total_provisions: int
    total_destroys: int
    total_claims: int


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the registry knows of an engine's state and of how it came about.

    Args:
        keep_awake_until: until when an admit keeps it awake; None if none does now.
        operation: kind of the operation under way; with its step and beginning, None if there is none.
        quarantined: whether that operation could not be carried out and waits for an operator.
        status_by: who put it to sleep or stopped it, if it sleeps or is stopped.
    """

    status: EngineStatus
    status_since: datetime
    status_reason: str | None
    deep_asleep: bool
    busy_at: datetime | None
    busy_reason: str | None
    restart_attempts: int
    restart_at: datetime | None
    idle_sleep_after_s: int | None
    last_admit_at: datetime | None
    keep_awake_until: datetime | None
    operation: str | None
    step: str | None
    operation_since: datetime | None
    quarantined: bool
    status_by: str | None


@dataclass(frozen=True, slots=True)
class EngineHistory:
    """How an engine is, why, and what happened to it and to the user's former ones, the latest first."""

    report: EngineReport
    summary: str
    events: list[AuditEvent]


_UNDER_WAY = {
    "provision": "booting",
    "start": "booting",
    "restart": "being restarted",
    "wake": "waking up",
    "sleep": "going to sleep",
    "deep_sleep": "being stopped to free its memory",
    "stop": "being stopped",
    "rotate_key": "being given a new key",
    "destroy": "being destroyed",
    "backup": "being backed up",
}
# The operation under way has itself set this status, which so says nothing more.
_SET_BY_OPERATION = {
    (EngineStatus.PROVISIONING, "provision"),
    (EngineStatus.PROVISIONING, "start"),
    (EngineStatus.SLEEPING, "sleep"),
    (EngineStatus.STOPPED, "stop"),
    (EngineStatus.DESTROYING, "destroy"),
}


def summarize(report: EngineReport, *, restart_max_attempts: int) -> str:
    """How the engine is and why, in words; the parts are divided by semicolons."""
    becoming = (report.status, report.operation) in _SET_BY_OPERATION
    parts = [*([] if becoming else _status(report, restart_max_attempts)), *_operation(report)]
    if report.last_admit_at is not None:
        parts.append(f"last admit {_moment(report.last_admit_at)}")
    if report.keep_awake_until is not None:
        parts.append(f"kept awake until {_moment(report.keep_awake_until)}")
    return "; ".join(parts)


def _status(report: EngineReport, restart_max_attempts: int) -> list[str]:
    since = f"since {_moment(report.status_since)}"
    by = f" by {report.status_by}" if report.status_by else ""
    because = f": {report.status_reason}" if report.status_reason else ""
    match report.status:
        case EngineStatus.RUNNING:
            parts = [f"running {since}"]
            if report.busy_at is not None:
                parts.append(f"last at work {_moment(report.busy_at)}: {report.busy_reason}")
            return parts
        case EngineStatus.SLEEPING:
            depth = "deeply asleep" if report.deep_asleep else "asleep"
            if report.status_by == "system" and report.idle_sleep_after_s is not None:
                by = f", idle for more than the {report.idle_sleep_after_s} s of its policy"
            return [f"{depth} {since}{by}{because}"]
        case EngineStatus.FAILED:
            return [f"failed {since}{because}", _next_restart(report, restart_max_attempts)]
        case status:
            return [f"{status} {since}{by}{because}"]


def _next_restart(report: EngineReport, restart_max_attempts: int) -> str:
    if report.restart_at is not None:
        attempt = f"{report.restart_attempts + 1} of {restart_max_attempts}"
        return f"restart {attempt} due at {_moment(report.restart_at)}"
    if report.restart_attempts >= restart_max_attempts:
        return f"given up after {report.restart_attempts} restarts"
    return "no restart is due"


def _operation(report: EngineReport) -> list[str]:
    if report.operation is None or report.operation_since is None:
        return []
    words = _UNDER_WAY.get(report.operation, report.operation)
    stuck = "; it could not be done and waits for an operator" if report.quarantined else ""
    return [f"{words} ({report.step}) since {_moment(report.operation_since)}{stuck}"]


def _moment(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
