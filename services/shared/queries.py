"""Named SQL blocks in `.sql` files beside the code that runs them."""

import re
from importlib.resources.abc import Traversable
from typing import LiteralString, cast

_HEADER = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(file: Traversable) -> dict[str, LiteralString]:
    """Reads the blocks of an SQL file, each headed by a line `-- name: the_name`.

    Raises:
        ValueError: a name stands twice.
    """
    _, *parts = _HEADER.split(file.read_text(encoding="utf-8"))
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{file.name} names a block twice")
    # What the repository ships is as trusted as a literal in the code.
    return {name: cast(LiteralString, body.strip()) for name, body in zip(names, bodies, strict=True)}
