"""The use cases of products."""

import hmac
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Protocol
from uuid import UUID, uuid4

from services.provisioner.domain.paging import page_key, page_limit, page_token
from services.provisioner.domain.policy import Policy, parse_policy
from services.provisioner.domain.product import Product, Registration, check_slug, is_slug
from services.shared.errors import (
    InvalidAdminKey,
    InvalidPlatformKey,
    InvalidRequest,
    ProductNotFound,
    ProductSlugExists,
)
from services.shared.guesses import Guesses
from services.shared.keys import new_platform_key, platform_key_hash

ADMIN = "admin"

MAX_GRACE_S = 604_800
_MOST_GOOD_KEYS = 10_000


class Store(Protocol):
    async def insert(self, product: Product, key_hash: bytes, actor: str) -> bool: ...
    async def update_policy(self, product_id: UUID, policy: Policy, actor: str) -> bool: ...
    async def replace_key(self, product_id: UUID, key_hash: bytes, grace_s: int, actor: str) -> bool: ...
    async def set_disabled(self, product_id: UUID, disabled: bool, actor: str) -> Registration | None: ...
    async def get(self, product_id: UUID) -> Registration | None: ...
    async def page(self, after: str, limit: int) -> list[Registration]: ...
    async def by_key_hash(self, key_hash: bytes) -> Product | None: ...


class Products:
    """Args:
    store: keeps products.
    admin_key: what operators show.
    """

    def __init__(self, store: Store, admin_key: str) -> None:
        self._store = store
        self._guesses = Guesses()
        # Hashes of keys that were good when they were last looked up, which they are for every call.
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._admin_key_hash = sha256(admin_key.encode()).digest()

    async def authenticate(self, presented: Sequence[str], address: str) -> Product:
        """The product that a platform key belongs to.

        Args:
            presented: every value of the key's header.
            address: of IP, that the call comes from.

        Raises:
            InvalidPlatformKey: not exactly one key, or not a product's.
            RateLimited: too many from this address were wrong.
        """
        try:
            key_hash = platform_key_hash(presented)
            if key_hash not in self._good:
                await self._guesses.turn(address)
            product = await self._store.by_key_hash(key_hash)
            if product is None:
                self._good.pop(key_hash, None)
                raise InvalidPlatformKey
        except InvalidPlatformKey:
            self._guesses.wrong(address)
            raise
        self._good[key_hash] = None
        self._good.move_to_end(key_hash)
        if len(self._good) > _MOST_GOOD_KEYS:
            self._good.popitem(last=False)
        return product

    async def authenticate_admin(self, presented: Sequence[str], address: str) -> None:
        """Returns if the one key presented is the admin key.

        Raises:
            InvalidAdminKey: it is not.
            RateLimited: too many from this address were wrong.
        """
        hashed = sha256(presented[0].encode()).digest() if len(presented) == 1 else b""
        if not hmac.compare_digest(hashed, self._admin_key_hash):
            self._guesses.wrong(address)
            raise InvalidAdminKey

    async def authenticate_either(
        self, platform_keys: Sequence[str], admin_keys: Sequence[str], address: str
    ) -> Product | None:
        """The product that the platform key belongs to, or None for operators, who showed the admin key.

        Args:
            platform_keys: every value of the platform key's header.
            admin_keys: every value of the admin key's header; if there is any it alone counts.
            address: of IP, that the call comes from.

        Raises:
            InvalidPlatformKey: whatever is wrong with either.
            RateLimited: too many from this address were wrong.
        """
        if not admin_keys:
            return await self.authenticate(platform_keys, address)
        try:
            await self.authenticate_admin(admin_keys, address)
        except InvalidAdminKey as error:
            raise InvalidPlatformKey from error
        return None

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
        parsed_id = _product_id(product_id)
        if policy is None:
            raise InvalidRequest("policy: required")
        parsed = parse_policy(policy)
        if not await self._store.update_policy(parsed_id, parsed, ADMIN):
            raise ProductNotFound
        return parsed

    async def page(self, limit: int | None, token: str) -> tuple[list[Registration], str | None]:
        """Products by slug, and the token of the next page if there is one.

        Raises:
            InvalidRequest: naming the parameter.
        """
        limit = page_limit(limit)
        # One more than asked for tells whether there is a next page.
        found = await self._store.page(page_key(token, _slug) or "", limit + 1)
        shown = found[:limit]
        return shown, page_token(shown[-1].product.slug) if len(found) > limit else None

    async def get(self, product_id: str) -> Registration:
        """Raises:
        InvalidRequest, ProductNotFound.
        """
        return _found(await self._store.get(_product_id(product_id)))

    async def rotate_key(self, product_id: str, grace_s: int) -> str:
        """Gives a product a new platform key, of which only the hash is kept.

        Args:
            grace_s: seconds for which the old keys are still taken.

        Raises:
            InvalidRequest, ProductNotFound.
        """
        parsed_id = _product_id(product_id)
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest(f"grace_s: must be a whole number from 0 to {MAX_GRACE_S}")
        key = new_platform_key()
        if not await self._store.replace_key(parsed_id, platform_key_hash([key]), grace_s, ADMIN):
            raise ProductNotFound
        return key

    async def set_disabled(self, product_id: str, disabled: bool) -> Registration:
        """Refuses a product's keys from now on, or takes them again.

        Raises:
            InvalidRequest, ProductNotFound.
        """
        return _found(await self._store.set_disabled(_product_id(product_id), disabled, ADMIN))


def _product_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise InvalidRequest("product_id: must be a UUID") from error


def _slug(text: str) -> str:
    if not is_slug(text):
        raise ValueError
    return text


def _found(registration: Registration | None) -> Registration:
    if registration is None:
        raise ProductNotFound
    return registration
