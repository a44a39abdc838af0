import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from services.engine.conversation import Conversations, DatabaseUnavailable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a strange? name#.sqlite"


@pytest.fixture
def conversations(path: Path) -> Iterator[Conversations]:
    opened = Conversations(str(path))
    opened.open()
    yield opened
    opened.close()


def test_a_reply_recalls_what_was_said_the_turn_before(conversations: Conversations) -> None:
    first = conversations.take_turn("c", "my cat is called Miso")
    assert (first.number, first.messages) == (1, 2)
    assert "turn 1" in first.reply
    assert "Miso" not in first.reply
    second = conversations.take_turn("c", "what is it called?")
    assert (second.number, second.messages) == (2, 4)
    assert "turn 2" in second.reply
    assert "my cat is called Miso" in second.reply
    third = conversations.take_turn("c", "and now?")
    assert "what is it called?" in third.reply
    assert "Miso" not in third.reply


def test_conversations_know_nothing_of_each_other(conversations: Conversations) -> None:
    conversations.take_turn("a", "secret")
    other = conversations.take_turn("b", "hello")
    assert (other.number, other.messages) == (1, 2)
    assert "secret" not in other.reply


def test_a_long_message_is_stored_whole_and_recalled_in_part(conversations: Conversations, path: Path) -> None:
    message = "x" * 60_000
    conversations.take_turn("c", message)
    assert len(conversations.take_turn("c", "next").reply) < 400
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT text FROM messages WHERE turn = 1 AND role = 'user'").fetchone() == (message,)


def test_concurrent_turns_of_one_conversation_are_numbered_without_gap_or_double(conversations: Conversations) -> None:
    with ThreadPoolExecutor(8) as pool:
        turns = list(pool.map(lambda n: conversations.take_turn("c", f"message {n}"), range(40)))
    assert sorted(turn.number for turn in turns) == list(range(1, 41))
    assert all(turn.messages == 2 * turn.number for turn in turns)


def test_a_closed_store_reopens_with_its_turns_in_one_file(conversations: Conversations, path: Path) -> None:
    conversations.take_turn("c", "before")
    assert path.with_name(path.name + "-wal").exists()
    conversations.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    reopened = Conversations(str(path))
    reopened.open()
    assert "before" in reopened.take_turn("c", "after").reply
    reopened.close()


def test_a_database_locked_by_another_writer_is_unavailable_until_it_lets_go(
    conversations: Conversations, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engine.conversation.LOCK_TIMEOUT_S", 0.01)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable):
            conversations.check()
        with pytest.raises(DatabaseUnavailable):
            conversations.take_turn("c", "lost")
        other.execute("ROLLBACK")
    conversations.check()
    assert conversations.take_turn("c", "kept").number == 1


def test_a_database_whose_file_has_gone_is_unavailable(conversations: Conversations, path: Path) -> None:
    conversations.check()
    path.unlink()
    with pytest.raises(DatabaseUnavailable):
        conversations.check()
    with pytest.raises(DatabaseUnavailable):
        conversations.take_turn("c", "into the void")


def test_what_is_no_database_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_text("a letter to the operator, nothing that SQLite wrote" * 40)
    before = path.read_bytes()
    conversations = Conversations(str(path))
    with pytest.raises(DatabaseUnavailable):
        conversations.open()
    conversations.close()
    assert path.read_bytes() == before
