"""What an intent is made of, and what comes of it."""

from dataclasses import dataclass, field
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Newborn:
    """An engine that is yet to be made."""

    engine_id: UUID
    image: str
    encrypted_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pending:
    """An open operation on an engine, to be waited for."""

    operation_id: UUID
    engine_id: UUID
