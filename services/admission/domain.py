"""What Admission knows of products and engines, and what it decides."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class EngineStatus(StrEnum):
    """Where an engine is in its life; the values are those of the wire."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"
    DESTROYING = "destroying"


class DenialReason(StrEnum):
    """Why a user may not go in, when that is an answer and not an error."""

    ENGINE_NOT_FOUND = "engine_not_found"
    ENGINE_SLEEPING = "engine_sleeping"
    ENGINE_UNHEALTHY = "engine_unhealthy"


@dataclass(frozen=True, slots=True)
class Product:
    """A product, as far as admission is concerned; `rate_limit_rpm` is None for no limit."""

    product_id: UUID
    rate_limit_rpm: int | None
    max_keep_awake_s: int


@dataclass(slots=True)
class Engine:
    """An engine as the registry had it; `booting` if an operation that ends with it running is under way.

    `answer` is left to whoever tells callers of it, so that this is encoded once.
    """

    engine_id: UUID
    user_id: str
    status: EngineStatus
    url: str
    api_key: str = field(repr=False)
    engine_version: str
    created_at: datetime
    last_health_at: datetime | None
    booting: bool = False
    answer: bytes | None = field(default=None, init=False, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Admitted:
    engine: Engine


@dataclass(frozen=True, slots=True)
class Denied:
    reason: DenialReason


Decision = Admitted | Denied
