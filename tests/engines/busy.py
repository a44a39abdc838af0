"""The reference engine beside a thread that works without saying so."""

import sys
import threading
from hashlib import sha256

from services.engine.__main__ import main


def _work() -> None:
    block = bytes(1_000_000)
    while True:
        sha256(block).digest()


if __name__ == "__main__":
    threading.Thread(target=_work, daemon=True).start()
    sys.exit(main())
