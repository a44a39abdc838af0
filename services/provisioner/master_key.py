"""Giving up a master key: all that it has encrypted is encrypted anew, under the first.

Nothing is remembered of how far this has come, so it can end at any moment and be begun again;
what is done already takes a look. Services go on meanwhile: what they change is left as they have
written it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from services.provisioner.store.encrypted import COLUMNS, Column, EncryptedStore, Token
from services.shared.failpoints import reached
from services.shared.keys import EngineKeyring, UnreadableKey

_BATCH = 500
# No row has it.
_BEFORE_ALL = UUID(int=0)


@dataclass(slots=True)
class Tally:
    """The tokens of a column.

    Args:
        column: which.
        current: how many the first master key has encrypted.
        old: how many another one has.
        unreadable: what those are bound to that none of the master keys reads, or of another row.
    """

    column: Column
    current: int = 0
    old: int = 0
    unreadable: list[UUID] = field(default_factory=list)


class MasterKeyRotation:
    """Args:
    store: what is encrypted.
    keyring: of the master keys; the first is the one to stay.
    """

    def __init__(self, store: EncryptedStore, keyring: EngineKeyring) -> None:
        self._store = store
        self._keyring = keyring

    async def rotate(self, progress: Callable[[int, int], None]) -> int:
        """Encrypts anew what the first master key has not encrypted; returns how many tokens.

        Args:
            progress: told after every batch how many tokens were looked at, and how many there are.

        Raises:
            Unavailable: the registry can't be reached; what was done stays done.
        """
        total = sum([await self._store.count(column) for column in COLUMNS])
        seen = rotated = 0
        for column in COLUMNS:
            after = _BEFORE_ALL
            while tokens := await self._store.tokens(column, after, _BATCH):
                old, new = self._renewed(tokens)
                done = await self._store.replace(column, old, new) if old else 0
                rotated += done
                reached("rekey.replaced")
                if done == len(old):
                    after = tokens[-1].id
                    seen += len(tokens)
                    progress(seen, total)
                # Else some have changed meanwhile, and are looked at again.
        return rotated

    async def status(self) -> list[Tally]:
        """What is under which master key.

        Raises:
            Unavailable: the registry can't be reached.
        """
        tallies = [Tally(column) for column in COLUMNS]
        for tally in tallies:
            after = _BEFORE_ALL
            while tokens := await self._store.tokens(tally.column, after, _BATCH):
                for token in tokens:
                    try:
                        if self._keyring.renewed(token.id, token.value) == token.value:
                            tally.current += 1
                        else:
                            tally.old += 1
                    except UnreadableKey:
                        tally.unreadable.append(token.id)
                after = tokens[-1].id
        return tallies

    def _renewed(self, tokens: Sequence[Token]) -> tuple[list[Token], list[bytes]]:
        """Those that the first master key has not encrypted, and what is to stand in their places."""
        old, new = [], []
        for token in tokens:
            # What can't be read is left as it is, and named by the status.
            with suppress(UnreadableKey):
                renewed = self._keyring.renewed(token.id, token.value)
                if renewed != token.value:
                    old.append(token)
                    new.append(renewed)
        return old, new
