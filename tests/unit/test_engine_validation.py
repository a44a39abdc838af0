import json

import pytest

from services.engine.errors import InvalidRequest
from services.engine.validation import Execute, RotateKey, parse_execute, parse_rotate_key

HASH = "0a" * 32


def test_a_message_alone_is_a_turn_of_the_default_conversation() -> None:
    assert parse_execute(b'{"message": "hello"}') == Execute("hello", "default", 0)


def test_all_fields_are_taken() -> None:
    body = json.dumps({"message": "héllo", "conversation_id": "c" * 255, "delay_s": 600}).encode()
    assert parse_execute(body) == Execute("héllo", "c" * 255, 600)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"message": "\xff"}', "not valid JSON"),
        (b'{"message": "m", "delay_s": NaN}', "not valid JSON"),
        (b"[" * 60_000, "not valid JSON"),
        (b'{"message": "m", "delay_s": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"{}", "message"),
        (b'{"message": null}', "message"),
        (b'{"message": 1}', "message"),
        (b'{"message": ""}', "message"),
        (b'{"message": " \\n"}', "message"),
        (b'{"message": "\\ud800"}', "message"),
        (b'{"message": "m", "conversation_id": null}', "conversation_id"),
        (b'{"message": "m", "conversation_id": ""}', "conversation_id"),
        (b'{"message": "m", "conversation_id": 7}', "conversation_id"),
        (b'{"message": "m", "conversation_id": "\\udfff"}', "conversation_id"),
        (b'{"message": "m", "conversation_id": "' + b"c" * 256 + b'"}', "conversation_id"),
        (b'{"message": "m", "delay_s": null}', "delay_s"),
        (b'{"message": "m", "delay_s": true}', "delay_s"),
        (b'{"message": "m", "delay_s": "1"}', "delay_s"),
        (b'{"message": "m", "delay_s": -0.1}', "delay_s"),
        (b'{"message": "m", "delay_s": 600.1}', "delay_s"),
        (b'{"message": "m", "delay_s": 1e999}', "delay_s"),
        (b'{"message": "m", "conversationid": "c"}', "conversationid"),
    ],
)
def test_an_invalid_turn_is_refused_by_the_name_of_its_field(body: bytes, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        parse_execute(body)


def test_a_rotation_takes_a_hash_and_an_overlap() -> None:
    assert parse_rotate_key(json.dumps({"key_hash": HASH.upper(), "overlap_s": 3600}).encode()) == RotateKey(HASH, 3600)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"overlap_s": 1}, "key_hash"),
        ({"key_hash": None, "overlap_s": 1}, "key_hash"),
        ({"key_hash": HASH[:-1], "overlap_s": 1}, "key_hash"),
        ({"key_hash": HASH + "\n", "overlap_s": 1}, "key_hash"),
        ({"key_hash": HASH}, "overlap_s"),
        ({"key_hash": HASH, "overlap_s": 3601}, "overlap_s"),
        ({"key_hash": HASH, "overlap_s": False}, "overlap_s"),
        ({"key_hash": HASH, "overlap_s": 1, "key": "k"}, "'key'"),
    ],
)
def test_an_invalid_rotation_is_refused_by_the_name_of_its_field(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        parse_rotate_key(json.dumps(fields).encode())
