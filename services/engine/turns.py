"""How many turns run, and that they stay under a limit."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from services.engine.errors import Unavailable
from services.engine.server import MAX_CONNECTIONS

# Half of the connections, so that a busy engine still has some for health probes.
MAX_TURNS = MAX_CONNECTIONS // 2


class Turns:
    """Counts running turns."""

    def __init__(self) -> None:
        self._running = 0
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether a turn is running: an engine that says so is never frozen."""
        return self._running > 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Holds a place for one turn.

        Raises:
            Unavailable: all places are taken.
        """
        with self._lock:
            if self._running >= MAX_TURNS:
                raise Unavailable("too many turns are running")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
