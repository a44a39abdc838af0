"""Healthy at its first start only: while `started` lies in its volume, it ends at once."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    started = Path("started")
    if started.exists():
        sys.exit(1)
    started.touch()
    runpy.run_module("services.engine", run_name="__main__", alter_sys=True)
