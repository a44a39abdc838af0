"""Secrets are taken out of whatever is logged, wherever they stand in it.

Nothing logs a secret on purpose; this is for texts that others have written, such as the message
of an exception.
"""

import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType

import structlog

# Each with a word that has to be there, looked for first: most texts hold none.
_SECRETS = (
    ("k-sept-", re.compile(r"([ps]k-sept-)[\w-]+"), r"\1…"),
    ("gAAAA", re.compile(r"gAAAA[\w-]{95,}={0,2}"), "…"),  # what Fernet has encrypted
    ("=", re.compile(r"(?<![\w-])[\w-]{43}=(?!=)"), "…"),  # a key of Fernet
    ("://", re.compile(r"(://[^:/\s@]*:)[^\s/]*@"), r"\1…@"),
    ("password", re.compile(r"(password\s*=\s*)(?:'(?:\\.|[^'\\])*'|\S+)", re.DOTALL), r"\1…"),
)


def redact(text: str) -> str:
    """The text, with `…` for keys of callers, master keys, what they have encrypted, and passwords of databases."""
    for word, secret, instead in _SECRETS:
        if word in text:
            text = secret.sub(instead, text)
    return text


def redact_event(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A processor of structlog, for when exceptions have become text."""
    return {name: _redacted(value) for name, value in event.items()}


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {_redacted(name): _redacted(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one) for one in value]
    # As the log would write it.
    return redact(repr(value))


def write_last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says what ends this process; stands in for `sys.excepthook`."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
