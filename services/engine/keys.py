"""Which API keys the engine accepts; it knows keys only by their hashes."""

import hmac
import re
import threading
import time
from collections.abc import Callable
from hashlib import sha256


def parse_key_hash(text: str) -> str:
    """`text` as a key hash in lower case.

    Raises:
        ValueError: not a SHA-256 in hexadecimal.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("not 64 hexadecimal digits")
    return text.lower()


class KeyRing:
    """One current key, and former ones whose overlap has not ended.

    Args:
        key_hash: of the current key, as `parse_key_hash` returns it.
        monotonic: clock in seconds.
    """

    def __init__(self, key_hash: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._current = key_hash
        self._retired: dict[str, float] = {}
        self._monotonic = monotonic
        self._lock = threading.Lock()

    def accepts(self, key: str) -> bool:
        """Whether `key` is the current one or one in its overlap."""
        with self._lock:
            return self._accepts(_digest(key))

    def rotate(self, key: str, key_hash: str, overlap_s: float) -> bool:
        """Makes `key_hash` current; the one before it stays good for `overlap_s` seconds.

        Only the current key may do so: a leaked one in its overlap must not take the engine over.
        Repeating a rotation changes nothing, and either key may do that, so that a caller who
        never got the answer can ask again.

        Returns:
            False if `key` is not entitled to it.
        """
        digest = _digest(key)
        with self._lock:
            if key_hash == self._current:
                return self._accepts(digest)
            if not hmac.compare_digest(digest, self._current):
                return False
            now = self._monotonic()
            self._retired = {h: end for h, end in self._retired.items() if now < end and h != key_hash}
            self._retired[self._current] = now + overlap_s
            self._current = key_hash
            return True

    def _accepts(self, digest: str) -> bool:
        now = self._monotonic()
        good = [self._current, *(h for h, end in self._retired.items() if now < end)]
        return any(hmac.compare_digest(digest, h) for h in good)


def _digest(key: str) -> str:
    # HTTP header values arrive decoded as Latin-1.
    return sha256(key.encode("latin-1")).hexdigest()
