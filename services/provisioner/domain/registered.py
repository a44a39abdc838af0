"""Engines as the reconciler compares them with what exists."""

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Registered:
    """What the registry says of an engine.

    Args:
        status: as it stands in the row: a later version may know more of them than this one.
        deep_asleep: a sleeper whose instance was stopped.
        busy: an operation is open, and decides what the engine becomes.
    """

    engine_id: UUID
    status: str
    deep_asleep: bool
    busy: bool
