"""The audit log: what happened, for ever as it was written."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class AuditAction(StrEnum):
    """Everything that is written to the audit log."""

    PROVISION = "provision"
    START = "start"
    STOP = "stop"
    SLEEP = "sleep"
    WAKE = "wake"
    DESTROY = "destroy"
    ROTATE_KEY = "rotate_key"
    BACKUP = "backup"
    HEALTH_FAILED = "health_failed"
    AUTO_RESTART_START = "auto_restart_start"
    AUTO_RESTART_SUCCESS = "auto_restart_success"
    AUTO_RESTART_FAILED = "auto_restart_failed"
    AUTO_RESTART_GAVE_UP = "auto_restart_gave_up"
    POLICY_REGISTER = "policy_register"
    POLICY_UPDATE = "policy_update"
    KEY_ROTATE = "key_rotate"
    PRODUCT_DISABLE = "product_disable"
    PRODUCT_ENABLE = "product_enable"
    ADMIT_DENIED = "admit_denied"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One row of `audit_events`; `action` as it was written, be it by a later version."""

    event_id: int
    at: datetime
    action: str
    actor: str
    outcome: str
    product_id: UUID
    engine_id: UUID | None
    user_id: str | None
    duration_ms: int | None
    error_code: str | None
    detail: str | None
    count: int | None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events are meant; None for any.

    Args:
        product_id: of this product.
        user_id: of this user's engines, former ones included; only within a product.
        action: of this action.
    """

    product_id: UUID | None = None
    user_id: str | None = None
    action: AuditAction | None = None


@dataclass(frozen=True, slots=True)
class AuditPage:
    events: list[AuditEvent]
    next_page_token: str | None
