"""The directory of one installation on this machine: data, secrets, logs, and what is running."""

import fcntl
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.cli.failure import Failure
from services.provisioner.settings import BackendKind


class InUse(Failure):
    """Another process runs the platform on this directory."""


class VarDirectory:
    """Others may pass through the directory itself: started by root, PostgreSQL runs as a user of
    its own and must get to its data. What is secret is in directories for the owner alone.

    Args:
        path: made when something is put into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.postgres = path / "postgres"
        self.run = path / "run"
        self.environment = self.run / "env"

    def registry(self, backend: BackendKind) -> Path:
        """The data of PostgreSQL; one backend can't run the engines of another, so each has a registry of its own."""
        name = self.postgres.name
        return self.postgres if backend is BackendKind.PROCESS else self.path / f"{name}-{backend}"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only one process at a time gets inside; the lock ends with the process, however that ends.

        Raises:
            InUse: another one is inside.
        """
        path = self._private("run") / "up.lock"
        # Not emptied before it is ours: it holds the other one's pid.
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InUse(f"another `september` runs on {self.path}, pid {file.read().strip()}") from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def secret_file(self, name: str, make: Callable[[], str]) -> Path:
        """The file of the secret of that name; the first time, of what `make` returns."""
        path = self._private("secrets") / name
        if not path.exists():
            _write(path, make() + "\n")
        return path

    def secret(self, name: str, make: Callable[[], str]) -> str:
        """The secret in that file."""
        return self.secret_file(name, make).read_text().strip()

    def forget(self, name: str) -> None:
        """Drops a secret that has become worthless."""
        (self._private("secrets") / name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        """The path of a log to begin; the last one is kept as `.1`."""
        path = self._private("log") / f"{name}.log"
        if path.exists():
            path.replace(path.with_name(f"{path.name}.1"))
        return path

    @contextmanager
    def announced(self, values: Mapping[str, str]) -> Iterator[None]:
        """Inside, `run/env` gives shells these variables."""
        self._private("run")
        _write(self.environment, "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()))
        try:
            yield
        finally:
            self.environment.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> Path:
        """Puts a file into `run`; returns its path."""
        path = self._private("run") / name
        _write(path, text)
        return path

    def _private(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


def _write(path: Path, text: str) -> None:
    """All of it or nothing, and never readable by others: a lost or half-written key can't be made again."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
