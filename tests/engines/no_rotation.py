"""The reference engine as it would be without the endpoint for new keys."""

import sys
from typing import Never

from services.engine.__main__ import main
from services.engine.errors import RouteNotFound
from services.engine.handler import Handler


def no_such_route(self: Handler, body: bytes) -> Never:
    raise RouteNotFound


if __name__ == "__main__":
    Handler._rotate_key = no_such_route  # type: ignore[method-assign]
    sys.exit(main())
