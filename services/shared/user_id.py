"""The rule for user ids."""

import re

from services.shared.errors import InvalidRequest

# No control characters (Unicode category Cc) and no line separators; the rest of UTF-8 is the product's affair.
USER_ID = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,255}")


def check_user_id(user_id: str) -> None:
    """Refuses a user id that is not 1 to 255 printable characters, or that no path can carry.

    Raises:
        InvalidRequest: naming the field.
    """
    if not USER_ID.fullmatch(user_id):
        raise InvalidRequest("user_id: must be 1 to 255 printable characters")
    if user_id in {".", ".."}:
        raise InvalidRequest("user_id: must not be '.' or '..'")
