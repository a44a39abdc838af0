"""Engines as the registry knows them."""

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
    """Why there is no engine to go to, when that is an answer and not an error."""

    ENGINE_NOT_FOUND = "engine_not_found"
    ENGINE_SLEEPING = "engine_sleeping"
    ENGINE_UNHEALTHY = "engine_unhealthy"


@dataclass(frozen=True, slots=True)
class Sighting:
    """How an engine is at a moment; `operation` and `step` are empty if nothing is being done to it."""

    status: EngineStatus
    operation: str
    step: str


@dataclass(frozen=True, slots=True)
class Engine:
    """One row of `engines`, with its port; whose it is, those who ask know.

    `image` is the name that was asked for, `image_id` what it stood for when the engine was made: what
    every later instance is made of. None until then, and where images have no ids.
    """

    engine_id: UUID
    status: EngineStatus
    image: str
    generation: int
    url: str
    encrypted_key: bytes = field(repr=False)
    created_at: datetime
    last_health_at: datetime | None
    port: int | None
    pending_key: bytes | None = field(repr=False)
    image_id: str | None
