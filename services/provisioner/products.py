"""The use cases of products."""

import hmac
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Protocol
from uuid import UUID, uuid4

from services.provisioner.domain.policy import Policy, parse_policy
from services.provisioner.domain.product import Product, check_slug
from services.shared.errors import (
    InvalidAdminKey,
    InvalidPlatformKey,
    InvalidRequest,
    ProductNotFound,
    ProductSlugExists,
)
from services.shared.keys import new_platform_key, platform_key_hash

ADMIN = "admin"


class Store(Protocol):
    async def insert(self, product: Product, key_hash: bytes, actor: str) -> bool: ...
    async def update_policy(self, product_id: UUID, policy: Policy, actor: str) -> bool: ...
    async def by_key_hash(self, key_hash: bytes) -> Product | None: ...


class Products:
    """Args:
    store: keeps products.
    admin_key: what operators show.
    """

    def __init__(self, store: Store, admin_key: str) -> None:
        self._store = store
        self._admin_key_hash = sha256(admin_key.encode()).digest()

    async def authenticate(self, presented: Sequence[str]) -> Product:
        """The product that a platform key belongs to.

        Args:
            presented: every value of the key's header.

        Raises:
            InvalidPlatformKey: not exactly one key, or not a product's.
        """
        product = await self._store.by_key_hash(platform_key_hash(presented))
        if product is None:
            raise InvalidPlatformKey
        return product

    def authenticate_admin(self, presented: Sequence[str]) -> None:
        """Raises `InvalidAdminKey` unless the one key presented is the admin key."""
        hashed = sha256(presented[0].encode()).digest() if len(presented) == 1 else b""
        if not hmac.compare_digest(hashed, self._admin_key_hash):
            raise InvalidAdminKey

    async def register(self, slug: str, policy: Mapping[str, object] | None) -> tuple[Product, str]:
        """Makes a product; returns it with its platform key, of which only the hash is kept.

        Raises:
            InvalidRequest, ProductSlugExists.
        """
        check_slug(slug)
        if policy is None:
            # Optional, a misspelt `policy` would register a product without the limits that were meant.
            raise InvalidRequest("policy: required")
        product = Product(uuid4(), slug, parse_policy(policy))
        key = new_platform_key()
        if not await self._store.insert(product, platform_key_hash([key]), ADMIN):
            raise ProductSlugExists("slug: another product has it")
        return product, key

    async def update_policy(self, product_id: str, policy: Mapping[str, object] | None) -> Policy:
        """Replaces a product's policy; returns the one in force.

        Raises:
            InvalidRequest, ProductNotFound.
        """
        try:
            parsed_id = UUID(product_id)
        except ValueError as error:
            raise InvalidRequest("product_id: must be a UUID") from error
        if policy is None:
            raise InvalidRequest("policy: required")
        parsed = parse_policy(policy)
        if not await self._store.update_policy(parsed_id, parsed, ADMIN):
            raise ProductNotFound
        return parsed
