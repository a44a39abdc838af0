"""Healthy at its first start only, and without the endpoint for new keys."""

import runpy

from services.engine.handler import Handler
from tests.engines.no_rotation import no_such_route

if __name__ == "__main__":
    Handler._rotate_key = no_such_route  # type: ignore[method-assign]
    runpy.run_module("tests.engines.fragile", run_name="__main__", alter_sys=True)
