"""Takes 2 s before it listens, then is the reference engine."""

import runpy
import time

if __name__ == "__main__":
    time.sleep(2)
    runpy.run_module("services.engine", run_name="__main__", alter_sys=True)
