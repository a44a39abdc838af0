"""Products: the backends whose users have engines."""

import re
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.provisioner.domain.policy import Policy
from services.shared.errors import InvalidRequest

SLUG = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class Product:
    product_id: UUID
    slug: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class Registration:
    """A product as operators see it; its keys are refused since `disabled_at`, if that is set."""

    product: Product
    created_at: datetime
    disabled_at: datetime | None


def is_slug(text: str) -> bool:
    """Whether this can name a product."""
    return SLUG.fullmatch(text) is not None


def check_slug(slug: str) -> None:
    """Raises `InvalidRequest` if this can't name a product."""
    if not is_slug(slug):
        raise InvalidRequest("slug: must be 1 to 63 lower-case letters, digits and hyphens, beginning with a letter")
