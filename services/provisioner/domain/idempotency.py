"""Idempotency keys: what makes a call the same as one before it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Self
from uuid import UUID, uuid5

from services.shared.errors import InvalidRequest

KEY = re.compile(r"[ -~]{1,255}")
# Operators are one caller.
_OPERATORS = UUID(int=0)


@dataclass(frozen=True, slots=True)
class KeyedCall:
    """A call that shows a key.

    Args:
        key_id: of the key among all keys of all callers.
        request_hash: SHA-256 of what is asked for.
    """

    key_id: UUID
    request_hash: bytes

    @classmethod
    def of(cls, caller: UUID | None, keys: Sequence[str], method: str, body: bytes) -> Self:
        """The call of a product, or of an operator, who has no id.

        Args:
            keys: every value of the key's header.

        Raises:
            InvalidRequest: not exactly one key, or one that can't be.
        """
        if len(keys) != 1 or not KEY.fullmatch(keys[0]):
            raise InvalidRequest("idempotency-key: must be given once, as 1 to 255 printable ASCII characters")
        return cls(uuid5(caller or _OPERATORS, keys[0]), sha256(method.encode() + b"\0" + body).digest())
