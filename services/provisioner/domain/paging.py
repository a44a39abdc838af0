"""Pages of long lists. Each begins after the key that the page before has ended with."""

import base64
from collections.abc import Callable
from typing import TypeVar

from services.shared.errors import InvalidRequest

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

Key = TypeVar("Key")


def page_limit(limit: int | None) -> int:
    """How many to send; None takes the default.

    Raises:
        InvalidRequest: naming the parameter.
    """
    if limit is None:
        return DEFAULT_LIMIT
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit: must be a whole number from 1 to {MAX_LIMIT}")
    return limit


def page_token(key: str) -> str:
    """The key of a page's last entry, as callers get it: opaque, and fit for a URL."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def page_key(token: str, parse: Callable[[str], Key]) -> Key | None:
    """The key that a page begins after; None for the first page, whose token is empty.

    Args:
        parse: reads the key; raises `ValueError` if it is none.

    Raises:
        InvalidRequest: the token is not one that was given out; names the parameter.
    """
    if not token:
        return None
    try:
        key = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
        # Decoding lets much pass that encoding never makes.
        if page_token(key) != token:
            raise ValueError
        return parse(key)
    except ValueError as error:
        raise InvalidRequest("page_token: must be the next_page_token of another page") from error
