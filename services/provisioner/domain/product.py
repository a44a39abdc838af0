"""Products: the backends whose users have engines."""

import re
from dataclasses import dataclass
from uuid import UUID

from services.provisioner.domain.policy import Policy
from services.shared.errors import InvalidRequest

_SLUG = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class Product:
    product_id: UUID
    slug: str
    policy: Policy


def check_slug(slug: str) -> None:
    """Raises `InvalidRequest` if this can't name a product."""
    if not _SLUG.fullmatch(slug):
        raise InvalidRequest("slug: must be 1 to 63 lower-case letters, digits and hyphens, beginning with a letter")
