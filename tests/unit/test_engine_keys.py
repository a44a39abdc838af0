from hashlib import sha256

import pytest

from services.engine.keys import KeyRing, parse_key_hash


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def hash_of(key: str) -> str:
    return sha256(key.encode()).hexdigest()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def ring(clock: HandClock) -> KeyRing:
    return KeyRing(hash_of("first"), clock)


def test_only_the_key_behind_the_hash_is_accepted(ring: KeyRing) -> None:
    assert ring.accepts("first")
    for key in ("", "First", "first ", hash_of("first"), "\xff"):
        assert not ring.accepts(key)


def test_after_a_rotation_both_keys_are_good_until_the_overlap_ends(ring: KeyRing, clock: HandClock) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=10)
    assert ring.accepts("second")
    clock.now = 9.9
    assert ring.accepts("first")
    clock.now = 10
    assert not ring.accepts("first")
    assert ring.accepts("second")


def test_without_an_overlap_the_old_key_ends_at_once(ring: KeyRing) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=0)
    assert not ring.accepts("first")


def test_a_key_in_its_overlap_or_unknown_cannot_rotate(ring: KeyRing) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=10)
    assert not ring.rotate("first", hash_of("third"), overlap_s=10)
    assert not ring.rotate("unknown", hash_of("third"), overlap_s=10)
    assert not ring.accepts("third")


@pytest.mark.parametrize("key", ["first", "second"])
def test_repeating_a_rotation_succeeds_and_prolongs_nothing(ring: KeyRing, clock: HandClock, key: str) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=10)
    clock.now = 5
    assert ring.rotate(key, hash_of("second"), overlap_s=10)
    clock.now = 10
    assert not ring.accepts("first")
    assert not ring.rotate("first", hash_of("second"), overlap_s=10)


def test_a_second_rotation_does_not_shorten_the_first_overlap(ring: KeyRing, clock: HandClock) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=10)
    assert ring.rotate("second", hash_of("third"), overlap_s=5)
    clock.now = 7
    assert ring.accepts("first")
    assert not ring.accepts("second")


def test_rotating_back_makes_a_retired_key_current_for_good(ring: KeyRing, clock: HandClock) -> None:
    assert ring.rotate("first", hash_of("second"), overlap_s=10)
    assert ring.rotate("second", hash_of("first"), overlap_s=0)
    clock.now = 11
    assert ring.accepts("first")


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "g" * 64, "a" * 64 + "\n", "é" * 64])
def test_what_is_no_sha256_is_no_key_hash(text: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        parse_key_hash(text)


def test_a_key_hash_may_be_written_in_upper_case() -> None:
    assert KeyRing(parse_key_hash(hash_of("first").upper())).accepts("first")
