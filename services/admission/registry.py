"""What Admission knows of the registry, and where it learns it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.admission.domain import Engine, Product

EngineKey = tuple[UUID, str]
"""A product and its user."""


class Registry(Protocol):
    """What the decision rests on. Errors: `Unavailable` if nobody can know it now."""

    async def product_by_key(self, key_hash: bytes) -> Product | None:
        """The product that a platform key belongs to, by the key's SHA-256."""

    def knows_key(self, key_hash: bytes) -> bool:
        """Whether a key with this SHA-256 was good when it was last looked up, and so may be now."""

    async def engine(self, product_id: UUID, user_id: str) -> Engine | None:
        """A user's engine, as far as it is known. Nothing else runs between the last look and the return."""

    async def engine_now(self, product_id: UUID, user_id: str) -> Engine | None:
        """A user's engine, looked up anew. Only a product's own users are ever found by its id."""

    def forget_engine(self, product_id: UUID, user_id: str) -> None:
        """Something has changed: what is known of the user's engine may be wrong."""


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """A key and what it opens, for so many seconds from when it was asked for; None for no end."""

    product: Product
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed in the registry.

    Args:
        at: moment on the registry's clock; what was committed before it is in this or an earlier answer.
        next: where to go on reading.
        incarnation: of the registry: another one than before if it was restored from a backup meanwhile.
        changed: by its id, each change: a product, and its user or None if it is the product itself.
    """

    at: datetime
    next: str
    incarnation: UUID
    changed: Mapping[int, tuple[UUID, str | None]]


class RegistrySource(Protocol):
    """The registry itself, asked for several things at once; what is missing in an answer does not exist.

    Errors: `Unavailable`.
    """

    async def platform_keys(self, key_hashes: Sequence[bytes]) -> Mapping[bytes, PlatformKey]: ...
    async def engines(self, keys: Sequence[EngineKey]) -> Mapping[EngineKey, Engine | Exception]: ...
    async def changes(self, since: str | None) -> Changes: ...
