"""What Admission reads of the registry."""

from typing import Protocol
from uuid import UUID

from services.admission.domain import Engine, Product


class Registry(Protocol):
    """Errors: `Unavailable` if the registry can't be reached."""

    async def product_by_key(self, key_hash: bytes) -> Product | None:
        """The product that a platform key belongs to, by the key's SHA-256."""

    async def engine(self, product_id: UUID, user_id: str) -> Engine | None:
        """A user's engine. Only a product's own users are ever found by its id."""
