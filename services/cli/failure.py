"""How a command fails."""

from pathlib import Path

_LAST_LINES = 20


class Failure(Exception):
    """What its caller is told on standard error, in one line if that says it all; the exit code is 1."""


def failure_with_log(what: str, log: Path) -> Failure:
    """A failure that shows the end of the log that explains it."""
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if log.exists() else []
    return Failure("\n  ".join([f"{what}; the end of {log}:", *(lines or ["(empty)"])]))
