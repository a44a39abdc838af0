"""Keys that callers hold: how they are made, recognised and kept.

Platform keys are kept as SHA-256 only: they have 256 random bits, so that a hash is as good as
a slow one and can be looked up. Engine keys have to be given out again, so they are encrypted.
"""

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from uuid import UUID

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from services.shared.errors import InvalidPlatformKey

_PLATFORM_KEY = re.compile(r"pk-sept-[A-Za-z0-9_-]{43}")


def new_platform_key() -> str:
    return f"pk-sept-{secrets.token_urlsafe(32)}"


def new_engine_key() -> str:
    return f"sk-sept-{secrets.token_urlsafe(32)}"


def platform_key_hash(presented: Sequence[str]) -> bytes:
    """SHA-256 of the one platform key that a caller presented.

    Args:
        presented: every value of the key's header.

    Raises:
        InvalidPlatformKey: none, several, or something that can't be a platform key; known
            without asking the registry.
    """
    if len(presented) != 1 or not _PLATFORM_KEY.fullmatch(presented[0]):
        raise InvalidPlatformKey
    return hashlib.sha256(presented[0].encode()).digest()


class UnreadableKey(Exception):
    """An engine's key can't be decrypted: another master key, or a token of another engine."""


class EngineKeyring:
    """Encrypts engine keys, each bound to its engine: a token moved to another row is refused.

    Answers that are kept for their idempotency keys are encrypted, and bound to those, in the same way.

    Args:
        master_keys: Fernet keys; the first encrypts, all decrypt.
    """

    def __init__(self, master_keys: Sequence[str]) -> None:
        fernets = [Fernet(key) for key in master_keys]
        self._fernet, self._first = MultiFernet(fernets), fernets[0]

    def encrypt(self, engine_id: UUID, key: str) -> bytes:
        return self._fernet.encrypt(engine_id.bytes + key.encode())

    def decrypt(self, engine_id: UUID, token: bytes) -> str:
        """Raises `UnreadableKey` if the token is not one of this engine's."""
        return self._content(engine_id, token).decode()

    def renewed(self, engine_id: UUID, token: bytes) -> bytes:
        """The token if the first master key has made it, else one of the same content that it makes now.

        Raises `UnreadableKey` as `decrypt` does.
        """
        self._content(engine_id, token)
        try:
            self._first.decrypt(token)
        except InvalidToken:
            return self._fernet.rotate(token)
        return token

    def _content(self, engine_id: UUID, token: bytes) -> bytes:
        try:
            plaintext = self._fernet.decrypt(token)
        except InvalidToken as error:
            raise UnreadableKey(engine_id) from error
        if plaintext[:16] != engine_id.bytes:
            raise UnreadableKey(engine_id)
        return plaintext[16:]


def is_fernet_key(key: str) -> bool:
    """Whether this is 32 bytes in URL-safe base64, as Fernet wants."""
    try:
        return len(base64.b64decode(key.encode(), altchars=b"-_", validate=True)) == 32
    except ValueError:
        return False
