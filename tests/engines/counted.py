"""Adds a line to `starts` in its volume whenever it is started, then is the reference engine."""

import os
import runpy
from pathlib import Path

if __name__ == "__main__":
    with Path("starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    runpy.run_module("services.engine", run_name="__main__", alter_sys=True)
