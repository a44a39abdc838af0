"""Conversations in SQLite, and the replies computed from them.

Invariant: a turn is committed, whole, before its first word is sent. Whatever a caller has
read is remembered, after SIGKILL too.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple
from urllib.parse import quote

# How long a writer waits for another one, in seconds; a turn's transaction takes milliseconds.
LOCK_TIMEOUT_S = 2.0
RECALL_CHARACTERS = 200

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS messages (
    conversation_id TEXT NOT NULL,
    turn INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    text TEXT NOT NULL,
    PRIMARY KEY (conversation_id, turn, role)
);
CREATE TABLE IF NOT EXISTS write_check (id INTEGER PRIMARY KEY CHECK (id = 1), checks INTEGER NOT NULL);
INSERT OR IGNORE INTO write_check VALUES (1, 0);
COMMIT;
"""


class Turn(NamedTuple):
    """Args: number: counted from 1 in its conversation. messages: stored in it, this turn's included."""

    number: int
    reply: str
    messages: int


class DatabaseUnavailable(Exception):
    """SQLite can't be read or written."""


class Conversations:
    """The messages of every conversation in one SQLite file; safe to use from any thread.

    Args:
        path: of the file, made if missing; its directory must exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._anchor: sqlite3.Connection | None = None

    def open(self) -> None:
        """Makes what is missing, recovers what a crash left.

        Raises:
            DatabaseUnavailable: not a database, or not writable.
        """
        with _translated():
            # Stays open, because each close of a last connection would fold the WAL.
            self._anchor = self._connect("rwc")
            self._anchor.execute("PRAGMA journal_mode = WAL")
            self._anchor.executescript(SCHEMA)

    def close(self) -> None:
        """Folds the WAL into the file; from the thread that opened."""
        if self._anchor is not None:
            self._anchor.close()

    def take_turn(self, conversation_id: str, message: str) -> Turn:
        """Computes the reply from what is stored, and stores both in the same transaction.

        Raises:
            DatabaseUnavailable: nothing was stored.
        """
        with self._transaction(synchronous="FULL") as db:
            last = db.execute(
                "SELECT turn, text FROM messages WHERE conversation_id = ? AND role = 'user'"
                " ORDER BY turn DESC LIMIT 1",
                (conversation_id,),
            ).fetchone()
            number, previous = (last[0] + 1, last[1]) if last else (1, None)
            reply = compose_reply(number, previous)
            db.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?)",
                [(conversation_id, number, "user", message), (conversation_id, number, "assistant", reply)],
            )
            (messages,) = db.execute(
                "SELECT count(*) FROM messages WHERE conversation_id = ?", (conversation_id,)
            ).fetchone()
        return Turn(number, reply, messages)

    def check(self) -> None:
        """Reads, and commits a real write.

        Raises:
            DatabaseUnavailable: one of them failed.
        """
        # Without a sync: a probe needs no durability, and must not cost the disk one.
        with self._transaction(synchronous="NORMAL") as db:
            db.execute("SELECT 1 FROM messages LIMIT 1").fetchone()
            db.execute("UPDATE write_check SET checks = checks + 1")

    @contextmanager
    def _transaction(self, *, synchronous: str) -> Iterator[sqlite3.Connection]:
        # A connection per transaction notices that the file has gone; an open one would
        # go on writing to a file that nobody will find.
        with _translated(), closing(self._connect("rw")) as db:
            db.execute(f"PRAGMA synchronous = {synchronous}")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(self._path)}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseUnavailable(str(error)) from error


def compose_reply(number: int, previous: str | None) -> str:
    """The answer of turn `number`; `previous` is what the user said in the turn before."""
    if previous is None:
        return f"This is turn {number} of this conversation. Nothing was said before it."
    if len(previous) > RECALL_CHARACTERS:
        previous = previous[:RECALL_CHARACTERS] + "…"
    return f"This is turn {number} of this conversation. Before it you said: {previous}"
