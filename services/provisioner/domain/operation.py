"""Operations: every change of an engine, written down before it is carried out."""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from services.shared.errors import BackendError, BootTimeout, Internal, PortExhaustion, ServiceError, Unavailable


class OperationKind(StrEnum):
    """What is done to the engine."""

    PROVISION = "provision"
    START = "start"
    WAKE = "wake"
    DESTROY = "destroy"


BOOTS = frozenset({OperationKind.PROVISION, OperationKind.START, OperationKind.WAKE})
"""Kinds that end with a running engine, so that a caller who wants one may wait for them."""


class Step(StrEnum):
    """How far an operation is. Each step may be repeated after a crash in the middle of it."""

    QUEUED = "queued"
    CREATING = "creating"
    STARTING = "starting"
    PROBING = "probing"
    REMOVING = "removing"
    # The boot has failed for the reason in the row, and what it made is being taken back.
    UNDOING = "undoing"


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    # Gave way to a destroy.
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that this process has claimed.

    `seconds_left` is the time to the deadline at the moment of the claim, on the database's clock.
    """

    operation_id: UUID
    engine_id: UUID
    product_id: UUID
    user_id: str
    kind: OperationKind
    step: Step
    actor: str
    attempts: int
    error_code: str | None
    error_message: str | None
    seconds_left: float


_FAILURES = {kind.code: kind for kind in (BackendError, BootTimeout, Internal, PortExhaustion, Unavailable)}


def failure_of(code: str | None, message: str | None) -> ServiceError | None:
    """The error that an operation's row tells of, if any."""
    return None if code is None else _FAILURES[code](message or "")


@dataclass(frozen=True, slots=True)
class OpenOperation:
    """The open operation of an engine; `unowned` if no live process works on it."""

    operation_id: UUID
    kind: OperationKind
    unowned: bool


@dataclass(frozen=True, slots=True)
class Settled:
    """How an operation ended; `outcome` is None for one that was quarantined."""

    operation_id: UUID
    kind: OperationKind
    outcome: Outcome | None
    error_code: str | None
    error_message: str | None

    def failure(self) -> ServiceError | None:
        """What to tell those who waited for it; None if it succeeded or gave way."""
        return failure_of(self.error_code, self.error_message)


class Ending(StrEnum):
    """What has become of the engine when its operation ends."""

    RUNNING = "running"
    FAILED = "failed"
    GONE = "gone"


class LeaseLost(Exception):
    """Another process may be working on the operation: touch nothing any more."""


class GiveWay(Exception):
    """A destroy was asked for; stop at the next safe point."""
