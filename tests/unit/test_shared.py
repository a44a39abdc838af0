"""The small parts that both services share."""

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from september.errors.v1 import errors_pb2
from services.shared import errors, queries
from services.shared.errors import InvalidPlatformKey, InvalidRequest, ServiceError
from services.shared.grpc_server import to_status
from services.shared.keys import (
    EngineKeyring,
    UnreadableKey,
    new_engine_key,
    new_platform_key,
    platform_key_hash,
)
from services.shared.loops import LoopEnded, Pulse, supervise
from services.shared.user_id import check_user_id


def test_an_engine_key_is_read_by_any_master_key_and_written_by_the_first() -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    engine_id, key = uuid4(), new_engine_key()
    before = EngineKeyring([old]).encrypt(engine_id, key)
    both = EngineKeyring([new, old])
    assert both.decrypt(engine_id, before) == key
    after = both.encrypt(engine_id, key)
    assert EngineKeyring([new]).decrypt(engine_id, after) == key
    with pytest.raises(UnreadableKey):
        EngineKeyring([old]).decrypt(engine_id, after)


def test_an_engine_key_moved_to_another_engine_is_refused() -> None:
    ring = EngineKeyring([Fernet.generate_key().decode()])
    token = ring.encrypt(uuid4(), new_engine_key())
    with pytest.raises(UnreadableKey):
        ring.decrypt(uuid4(), token)
    with pytest.raises(UnreadableKey):
        ring.decrypt(uuid4(), b"nonsense")


def test_platform_keys_are_random_and_recognised_by_their_form() -> None:
    key, other = new_platform_key(), new_platform_key()
    assert key.startswith("pk-sept-")
    assert key != other
    assert len(platform_key_hash([key])) == 32
    assert platform_key_hash([key]) != platform_key_hash([other])


@pytest.mark.parametrize(
    "presented",
    [[], [""], ["pk-sept-"], ["sk-sept-" + "a" * 43], ["pk-sept-" + "a" * 44], ["pk-sept-" + "é" * 43]],
)
def test_what_cannot_be_a_key_is_refused_without_a_look_up(presented: list[str]) -> None:
    with pytest.raises(InvalidPlatformKey):
        platform_key_hash(presented)


def test_two_keys_are_none() -> None:
    key = new_platform_key()
    with pytest.raises(InvalidPlatformKey):
        platform_key_hash([key, key])
    with pytest.raises(InvalidPlatformKey):
        platform_key_hash([f"{key},{key}"])


@given(st.text(min_size=1, max_size=255))
def test_a_user_id_is_accepted_or_refused_by_name(user_id: str) -> None:
    printable = not any(c < " " or "\x7f" <= c <= "\x9f" or c in "\u2028\u2029" for c in user_id)
    if printable and user_id not in {".", ".."}:
        check_user_id(user_id)
    else:
        with pytest.raises(InvalidRequest, match=r"^user_id: "):
            check_user_id(user_id)


def _kinds(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [k for k in kind.__subclasses__() if k is not errors.RemoteError]


@pytest.mark.parametrize("kind", _kinds(ServiceError), ids=lambda kind: kind.code)
def test_every_error_is_in_the_table(kind: type[ServiceError]) -> None:
    _, status = to_status(kind.code, "message", retry_after_s=1.5)
    assert [detail.type_url.rpartition(".")[2] for detail in status.details] == ["ErrorInfo", "RetryInfo"]


def test_every_code_of_the_table_has_both_statuses() -> None:
    for value in errors_pb2.ErrorCode.DESCRIPTOR.values[1:]:
        mapping = value.GetOptions().Extensions[errors_pb2.mapping]
        assert mapping.grpc_code > 0, value.name
        assert 400 <= mapping.http_status <= 599, value.name


def test_sql_blocks_are_found_by_name(tmp_path: Path) -> None:
    file = tmp_path / "q.sql"
    file.write_text("-- name: one\nSELECT 1\n\n-- name: two\n-- why\nSELECT 2\n")
    assert queries.load(file) == {"one": "SELECT 1", "two": "-- why\nSELECT 2"}
    file.write_text("-- name: one\nSELECT 1\n-- name: one\nSELECT 2\n")
    with pytest.raises(ValueError, match="twice"):
        queries.load(file)


async def _forever() -> None:
    await asyncio.Event().wait()


async def _returns() -> None:
    return


async def _raises() -> None:
    raise RuntimeError("broken")


async def test_a_loop_that_returns_ends_the_service() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await supervise(good=_forever(), bad=_returns())
    assert [type(e) for e in caught.value.exceptions] == [LoopEnded]


async def test_a_loop_that_raises_ends_the_service() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await supervise(good=_forever(), bad=_raises())
    assert [type(e) for e in caught.value.exceptions] == [RuntimeError]


async def test_a_pulse_given_while_nobody_waits_is_not_lost() -> None:
    pulse = Pulse()
    pulse.give()
    await pulse.wait(timeout_s=3600)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await pulse.wait(timeout_s=3600)
