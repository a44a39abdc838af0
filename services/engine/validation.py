"""Request bodies: JSON in, typed values or `InvalidRequest` out."""

import json
from typing import NamedTuple, NoReturn

from services.engine.errors import InvalidRequest
from services.engine.keys import parse_key_hash

MAX_CONVERSATION_ID = 255
MAX_DELAY_S = 600
MAX_OVERLAP_S = 3600

Fields = dict[str, object]


class Execute(NamedTuple):
    """Args: delay_s: how long the turn takes at least."""

    message: str
    conversation_id: str
    delay_s: float


class RotateKey(NamedTuple):
    key_hash: str
    overlap_s: float


def parse_execute(body: bytes) -> Execute:
    fields = _object(body, {"message", "conversation_id", "delay_s"})
    message = _text(fields, "message")
    conversation_id = _text({"conversation_id": "default"} | fields, "conversation_id")
    if len(conversation_id) > MAX_CONVERSATION_ID:
        raise InvalidRequest(f"conversation_id must be at most {MAX_CONVERSATION_ID} characters")
    return Execute(message, conversation_id, _number({"delay_s": 0} | fields, "delay_s", MAX_DELAY_S))


def parse_rotate_key(body: bytes) -> RotateKey:
    fields = _object(body, {"key_hash", "overlap_s"})
    try:
        key_hash = parse_key_hash(_text(fields, "key_hash"))
    except ValueError:
        raise InvalidRequest("key_hash must be a SHA-256 as 64 hexadecimal digits") from None
    return RotateKey(key_hash, _number(fields, "overlap_s", MAX_OVERLAP_S))


def _object(body: bytes, known: set[str]) -> Fields:
    try:
        fields = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidRequest("body is not valid JSON") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("body must be a JSON object")
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"unknown field {name[:64]!r}")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity: Python's JSON, nobody else's


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{name} must be a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can escape half a surrogate pair; no text in UTF-8 can hold it.
        raise InvalidRequest(f"{name} must be valid Unicode") from None
    return value


def _number(fields: Fields, name: str, maximum: int) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise InvalidRequest(f"{name} must be a number from 0 to {maximum}")
    return value
