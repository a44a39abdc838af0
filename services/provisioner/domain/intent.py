"""What an intent is made of, and what comes of it."""

from dataclasses import dataclass, field
from typing import Self
from uuid import UUID, uuid4

from services.shared.keys import EngineKeyring, new_engine_key


@dataclass(frozen=True, slots=True)
class Newborn:
    """An engine that is yet to be made."""

    engine_id: UUID
    image: str
    encrypted_key: bytes = field(repr=False)

    @classmethod
    def of(cls, image: str, keyring: EngineKeyring) -> Self:
        """One that is to run this image, with an id and a key of its own."""
        engine_id = uuid4()
        return cls(engine_id, image, keyring.encrypt(engine_id, new_engine_key()))


@dataclass(frozen=True, slots=True)
class Pending:
    """An open operation on an engine, to be waited for.

    `joined` if its end is the caller's answer; otherwise it only stands in the way of what the
    caller asked for, which has to be asked for again.
    """

    operation_id: UUID
    engine_id: UUID
    joined: bool = True
