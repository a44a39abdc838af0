"""Operations: every change of an engine, written down before it is carried out."""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from services.shared.errors import BackendError, BootTimeout, Internal, PortExhaustion, ServiceError, Unavailable

SYSTEM = "system"
"""Actor of what the platform does by itself."""

PATIENCE_S = 4.0
"""How long callers wait, in seconds, for what can't be reached; then they are told, and the operation goes on."""


class OperationKind(StrEnum):
    """What is done to the engine."""

    PROVISION = "provision"
    START = "start"
    WAKE = "wake"
    # An automatic start of a failed engine.
    RESTART = "restart"
    SLEEP = "sleep"
    # Stops a sleeper to free its memory.
    DEEP_SLEEP = "deep_sleep"
    STOP = "stop"
    ROTATE_KEY = "rotate_key"
    # Keeps the engine still while its volume is copied, and leaves it as it was. Who copies owns it.
    BACKUP = "backup"
    DESTROY = "destroy"


class Queue(StrEnum):
    """What an operation waits in line for; the row is put into it when it is written."""

    # A place to start an instance in.
    BOOT = "boot"
    # A place among those that put engines to sleep, and mostly wait.
    SLEEP = "sleep"
    OTHER = "other"


class Step(StrEnum):
    """How far an operation is. Each step may be repeated after a crash in the middle of it."""

    QUEUED = "queued"
    CREATING = "creating"
    STARTING = "starting"
    PROBING = "probing"
    STOPPING = "stopping"
    REMOVING = "removing"
    # All can see that the engine is to sleep; whoever was admitted before is being waited for.
    ANNOUNCED = "announced"
    FREEZING = "freezing"
    # The engine is being told its new key.
    ROTATING = "rotating"
    # The boot has failed for the reason in the row, and what it made is being taken back.
    UNDOING = "undoing"


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    # Gave way to what somebody asked for meanwhile.
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that this process has claimed.

    `cancelled` if it was asked to give way before it was claimed; `seconds_left` is the time to the
    deadline at the moment of the claim, on the database's clock. `request_id` and `traceparent` are
    those of the call that asked for it, if any did.
    """

    operation_id: UUID
    engine_id: UUID
    kind: OperationKind
    queue: Queue
    step: Step
    actor: str
    attempts: int
    error_code: str | None
    error_message: str | None
    cancelled: bool
    seconds_left: float
    request_id: str | None
    traceparent: str | None


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
    outcome: Outcome | None
    error_code: str | None
    error_message: str | None

    def failure(self) -> ServiceError | None:
        """What to tell those who waited for it; None if it succeeded or gave way."""
        return failure_of(self.error_code, self.error_message)


_FAILURES = {kind.code: kind for kind in (BackendError, BootTimeout, Internal, PortExhaustion, Unavailable)}


def failure_of(code: str | None, message: str | None) -> ServiceError | None:
    """The error that an operation's row tells of, if any."""
    return None if code is None else _FAILURES[code](message or "")


class LeaseLost(Exception):
    """Another process may be working on the operation: touch nothing any more."""


class GiveWay(Exception):
    """Something that matters more was asked for; stop at the next safe point."""
