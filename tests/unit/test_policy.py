"""Policies: read strictly, because a limit that isn't there is a limit that doesn't hold."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.provisioner.domain.policy import Policy, check_image, image_repository, parse_policy
from services.shared.errors import InvalidRequest, PolicyDenied, ServiceError


def test_a_whole_policy_is_read() -> None:
    fields = {
        "max_engines": 10.0,
        "rate_limit_rpm": 60.0,
        "allowed_images": ["a:*", "b@sha256:*"],
        "idle_sleep_after_s": 900.0,
        "max_keep_awake_s": 0.0,
    }
    assert parse_policy(fields) == Policy(10, 60, ("a:*", "b@sha256:*"), 900, 0)


def test_what_is_left_out_takes_its_default() -> None:
    assert parse_policy({"max_engines": 0}) == Policy(0, None, (), None, 3600)
    unlimited = parse_policy({"max_engines": 1, "rate_limit_rpm": None, "idle_sleep_after_s": None})
    assert (unlimited.rate_limit_rpm, unlimited.idle_sleep_after_s) == (None, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "policy.max_engines"),
        ({"max_engine": 1}, "policy.max_engine"),
        ({"max_engines": 1, "rate_limit": 60}, "policy.rate_limit"),
        ({"max_engines": 1, "MAX_ENGINES": 1}, "policy.MAX_ENGINES"),
        ({"max_engines": None}, "policy.max_engines"),
        ({"max_engines": -1}, "policy.max_engines"),
        ({"max_engines": 1.5}, "policy.max_engines"),
        ({"max_engines": "10"}, "policy.max_engines"),
        ({"max_engines": True}, "policy.max_engines"),
        ({"max_engines": math.nan}, "policy.max_engines"),
        ({"max_engines": math.inf}, "policy.max_engines"),
        ({"max_engines": 1e18}, "policy.max_engines"),
        ({"max_engines": [1]}, "policy.max_engines"),
        ({"max_engines": 1, "rate_limit_rpm": 0}, "policy.rate_limit_rpm"),
        ({"max_engines": 1, "rate_limit_rpm": -5}, "policy.rate_limit_rpm"),
        ({"max_engines": 1, "rate_limit_rpm": "60"}, "policy.rate_limit_rpm"),
        ({"max_engines": 1, "rate_limit_rpm": {}}, "policy.rate_limit_rpm"),
        ({"max_engines": 1, "allowed_images": "a:*"}, "policy.allowed_images"),
        ({"max_engines": 1, "allowed_images": [1]}, "policy.allowed_images[0]"),
        ({"max_engines": 1, "allowed_images": ["ok", ""]}, "policy.allowed_images[1]"),
        ({"max_engines": 1, "allowed_images": ["a b"]}, "policy.allowed_images[0]"),
        ({"max_engines": 1, "allowed_images": ["a"] * 101}, "policy.allowed_images"),
        ({"max_engines": 1, "allowed_images": None}, "policy.allowed_images"),
        ({"max_engines": 1, "idle_sleep_after_s": 0}, "policy.idle_sleep_after_s"),
        ({"max_engines": 1, "idle_sleep_after_s": -1}, "policy.idle_sleep_after_s"),
        ({"max_engines": 1, "idle_sleep_after_s": 0.5}, "policy.idle_sleep_after_s"),
        ({"max_engines": 1, "idle_sleep_after_s": "900"}, "policy.idle_sleep_after_s"),
        ({"max_engines": 1, "idle_sleep_after_s": 31_536_001}, "policy.idle_sleep_after_s"),
        ({"max_engines": 1, "idle_sleep_after": 900}, "policy.idle_sleep_after"),
        ({"max_engines": 1, "max_keep_awake_s": -1}, "policy.max_keep_awake_s"),
        ({"max_engines": 1, "max_keep_awake_s": 1.5}, "policy.max_keep_awake_s"),
        ({"max_engines": 1, "max_keep_awake_s": None}, "policy.max_keep_awake_s"),
        ({"max_engines": 1, "max_keep_awake_s": False}, "policy.max_keep_awake_s"),
        ({"max_engines": 1, "max_keep_awake_s": 604_801}, "policy.max_keep_awake_s"),
    ],
)
def test_what_is_wrong_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_policy(fields)
    assert error.value.message.startswith(f"{named}: ")


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


_NAMES = [field.name for field in dataclasses.fields(Policy)]


@given(st.dictionaries(st.sampled_from([*_NAMES, "other"]), _json))
def test_any_json_is_a_policy_or_an_invalid_request(fields: dict[str, object]) -> None:
    try:
        policy = parse_policy(fields)
    except InvalidRequest:
        return
    assert 0 <= policy.max_engines <= 1_000_000
    assert policy.rate_limit_rpm is None or 1 <= policy.rate_limit_rpm <= 1_000_000
    assert policy.idle_sleep_after_s is None or 1 <= policy.idle_sleep_after_s <= 31_536_000
    assert 0 <= policy.max_keep_awake_s <= 604_800


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("engine", "engine"),
        ("engine:dev", "engine"),
        ("host:5000/team/engine", "host:5000/team/engine"),
        ("host:5000/team/engine:1.2", "host:5000/team/engine"),
        ("engine@sha256:0f", "engine"),
        ("host:5000/engine:1@sha256:0f", "host:5000/engine"),
    ],
)
def test_the_repository_is_the_name_without_tag_and_digest(image: str, repository: str) -> None:
    assert image_repository(image) == repository


@pytest.mark.parametrize("image", ["engine", "engine:dev", "engine:1.0", "engine@sha256:00"])
def test_without_a_list_the_platforms_repository_is_allowed_in_any_version(image: str) -> None:
    check_image(image, Policy(1, None, ()), "engine:dev")


@pytest.mark.parametrize(
    ("image", "globs", "error"),
    [
        ("other:dev", (), PolicyDenied),
        ("engine-evil:dev", (), PolicyDenied),
        ("evil/engine:dev", (), PolicyDenied),
        ("169.254.169.254/engine", (), PolicyDenied),
        ("engine:dev", ("other:*",), PolicyDenied),
        ("ENGINE:dev", ("engine:*",), InvalidRequest),
        ("engine:dev\n", ("*",), InvalidRequest),
        ("", ("*",), InvalidRequest),
        ("--privileged", ("*",), InvalidRequest),
    ],
)
def test_other_images_are_refused(image: str, globs: tuple[str, ...], error: type[ServiceError]) -> None:
    with pytest.raises(error):
        check_image(image, Policy(1, None, globs), "engine:dev")
