"""Engines that were booted ahead and belong to nobody yet."""

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Member:
    """One of them.

    Args:
        status: as it stands in the row: a later version may know more of them than this one.
        stuck: its operation could not be carried out.
    """

    engine_id: UUID
    image: str
    url: str
    status: str
    stuck: bool
