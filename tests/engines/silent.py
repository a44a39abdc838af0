"""The reference engine that answers its first probe, and is then too busy to answer any."""

import sys
import threading

from services.engine.__main__ import main
from services.engine.handler import Handler

_first = Handler._health
_asked = threading.Event()


def _health(self: Handler, body: bytes) -> None:
    if _asked.is_set():
        threading.Event().wait()
    _asked.set()
    _first(self, body)


if __name__ == "__main__":
    Handler._health = _health  # type: ignore[assignment,method-assign]
    sys.exit(main())
