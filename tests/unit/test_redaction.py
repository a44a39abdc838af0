"""No secret gets into a log, whatever others have written into what is logged."""

import json
import subprocess
import sys
from typing import Any
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet
from hypothesis import assume, given
from hypothesis import strategies as st

from services.shared.keys import EngineKeyring, new_engine_key, new_platform_key
from services.shared.redaction import redact, redact_event
from tests.harness import ROOT

PASSWORD = "s3cret-pass"
MASTER_KEY = Fernet.generate_key().decode()
SECRETS = {
    "platform key": (new_platform_key(), "{}"),
    "engine key": (new_engine_key(), "{}"),
    "master key": (MASTER_KEY, "{}"),
    "two master keys": (MASTER_KEY, "{0},{0}"),
    "encrypted key": (EngineKeyring([MASTER_KEY]).encrypt(uuid4(), new_engine_key()).decode(), "b'{}'"),
    "url": (PASSWORD, "postgresql://september:{}@host:5432/registry?application_name=x"),
    "url without a user": (PASSWORD, "postgresql://:{}@host/registry"),
    "url with the password behind": (PASSWORD, "postgresql://host/registry?user=september&password={}"),
    "words": (PASSWORD, "host=/run user=september password={} dbname=registry"),
    "quoted words": ("two words", "host=/run password = '{}' dbname=registry"),
    "quoted words with a quote": ("it\\'s-mine", "password='{}' dbname=registry"),
}
PLAIN = st.text(alphabet=st.characters(exclude_characters="@=", exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("kind", SECRETS)
@given(before=PLAIN, after=PLAIN)
def test_a_secret_is_found_in_any_text(kind: str, before: str, after: str) -> None:
    secret, written = SECRETS[kind]
    assume(not [part for part in secret.split() if part in before + after])
    shown = redact(f"{before} {written.format(secret)} {after}")
    assert not [part for part in secret.split() if part in shown]
    assert shown.startswith(before)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9712/health",
        "dns:///127.0.0.1:50052 and ada@example.org",
        "engine 8b213d9f-ab73-42bb-a5b6-ba9a28b233ef is awake",
        "sha256:" + "0123456789abcdef" * 4,
        "the key pk-sept- has no end",
        "a password is missing",
    ],
)
def test_what_is_no_secret_is_left_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_secrets_are_found_in_all_that_is_logged() -> None:
    key = new_engine_key()

    class Odd:
        def __repr__(self) -> str:
            return f"<{key}>"

    event = {"event": key, "list": [key, {"deep": (key,)}], "map": {key: 1}, "odd": Odd(), "n": 1.5, "none": None}
    shown = redact_event(None, "info", event)
    assert key not in json.dumps(shown)
    assert (shown["n"], shown["none"]) == (1.5, None)


# Logs a key in every way there is, the last of which ends it.
LEAKY = """
import logging, sys, structlog
from services.shared import log
key = sys.argv[1]
log.configure("leaky", "INFO")
structlog.get_logger().info("leaks", key=key)
logging.getLogger("other").warning("it is %s", key)
try:
    raise ValueError(key)
except ValueError:
    structlog.get_logger().exception("raised")
    logging.getLogger("other").exception("raised")
raise RuntimeError(key)
"""


def test_no_way_to_log_shows_a_key() -> None:
    key = new_platform_key()
    ended = subprocess.run([sys.executable, "-c", LEAKY, key], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert key not in ended.stderr
    lines = ended.stderr.splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines[:4]]
    assert [event["event"] for event in events] == ["leaks", "it is pk-sept-…", "raised", "raised"]
    assert ["ValueError: pk-sept-…" in event.get("exception", "") for event in events] == [False, False, True, True]
    assert lines[-1] == "RuntimeError: pk-sept-…"
