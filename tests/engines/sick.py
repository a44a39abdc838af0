"""The reference engine, not well from the moment that the file `sick` lies in its volume until its next start."""

import sys
from pathlib import Path

from services.engine.__main__ import main
from services.engine.handler import Handler

SICK = Path("sick")
_well = Handler._health


def _health(self: Handler, body: bytes) -> None:
    if SICK.exists():
        self._respond(503, {"status": "sick"})
    else:
        _well(self, body)


if __name__ == "__main__":
    SICK.unlink(missing_ok=True)
    Handler._health = _health  # type: ignore[assignment,method-assign]
    sys.exit(main())
