"""How a command fails."""


class Failure(Exception):
    """What its caller is told on standard error, in one line if that says it all; the exit code is 1."""
