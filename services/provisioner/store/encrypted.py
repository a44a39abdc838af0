"""What the registry keeps encrypted, wherever it stands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from psycopg.sql import SQL, Composed, Identifier

from services.provisioner.store.rows import load_sql
from services.shared.postgres import Database

_SQL = load_sql("encrypted")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of tokens of the keyring.

    Args:
        table: its table.
        id: the column, unique, of the UUID that a token is bound to.
        name: of the column.
    """

    table: str
    id: str
    name: str

    def __str__(self) -> str:
        return f"{self.table}.{self.name}"


COLUMNS = (
    # Before the keys that it becomes: a commit in between takes a token along that is new already.
    Column("engines", "engine_id", "pending_key"),
    Column("engines", "engine_id", "encrypted_key"),
    Column("idempotency_keys", "key_id", "answer"),
)
"""All there are, in the order in which they can be encrypted anew."""


@dataclass(frozen=True, slots=True)
class Token:
    """Args:
    id: what it is bound to.
    value: it itself.
    """

    id: UUID
    value: bytes = field(repr=False)


class EncryptedStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def count(self, column: Column) -> int:
        """How many tokens a column has."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_statement("count", column))
            row = await cursor.fetchone()
        assert row is not None
        return int(row["tokens"])

    async def tokens(self, column: Column, after: UUID, limit: int) -> list[Token]:
        """Up to `limit` tokens of a column by their ids, from the first that comes after this one."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_statement("tokens", column), {"after": after, "limit": limit})
            return [Token(row["id"], row["token"]) for row in await cursor.fetchall()]

    async def replace(self, column: Column, tokens: Sequence[Token], new: Sequence[bytes]) -> int:
        """Puts the new in the place of tokens that are still there, in one transaction; returns how many were."""
        values = {"ids": [token.id for token in tokens], "old": [token.value for token in tokens], "new": list(new)}
        async with self._database.transaction() as tx:
            await tx.execute(_SQL["rekeying"])
            cursor = await tx.execute(_statement("replace", column), values)
            return cursor.rowcount


def _statement(name: str, column: Column) -> Composed:
    return SQL(_SQL[name]).format(
        table=Identifier(column.table), id=Identifier(column.id), column=Identifier(column.name)
    )
