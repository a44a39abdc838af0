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
    """An open operation on an engine, to be waited for.

    `joined` if its end is the caller's answer; otherwise it only stands in the way of what the
    caller asked for, which has to be asked for again.
    """

    operation_id: UUID
    engine_id: UUID
    joined: bool = True
