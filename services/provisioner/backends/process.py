"""Engines as processes of this machine, for development and for tests: no isolation, no limits."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState, PortTaken, Usage
from services.provisioner.backends.disk import free_bytes
from services.provisioner.backends.engine_directory import (
    EngineDirectory,
    Marker,
    MarkerState,
    empty_all_trash,
    engine_directories,
)
from services.provisioner.backends.engine_processes import EngineProcess, EngineProcesses
from services.provisioner.backends.instances import await_exit, refuse_older
from services.provisioner.backends.threads import BackendThreads
from services.shared.errors import BackendError, Unavailable
from services.shared.failpoints import reached

T = TypeVar("T")

_PAUSE_S = 0.002
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_ROOT = Path(__file__).resolve().parents[3]


class ProcessBackend:
    """Runs `python -m <image>` for every engine, in a session of its own.

    Engines outlive the process that started them. The truth is in two places that no crash can
    separate: the marker in the engine's directory, and the labels in the process's environment. All
    that is kept in memory is where the process was seen last.

    Several backends may work on the same directory, in one process or in many: a lock on the
    engine's directory makes every change of an engine one at a time.

    Args:
        installation: label of what is ours; nothing else is touched.
        data_dir: holds one directory per engine, with its volume and its log.
        catalog_dir: what engines find in `CATALOG_DIR`.
        threads: calls at the same time.
        timeout_s: seconds for one call.
    """

    def __init__(
        self,
        installation: str,
        data_dir: Path,
        catalog_dir: Path | None = None,
        *,
        threads: int = 8,
        timeout_s: float = 30.0,
    ) -> None:
        self._installation = installation
        self._data_dir = data_dir.absolute()
        self._catalog_dir = catalog_dir
        self._timeout_s = timeout_s
        self._threads = BackendThreads(threads, timeout_s)
        self._processes = EngineProcesses(installation)

    async def open(self) -> None:
        await self._run(self._open)

    async def close(self) -> None:
        self._threads.close()

    async def create(self, spec: EngineSpec) -> None:
        await self._run(lambda: self._create(spec), spec.engine_id)

    async def start(self, spec: EngineSpec) -> None:
        await self._run(lambda: self._start(spec), spec.engine_id)

    async def inspect(self, engine_id: UUID) -> Instance | None:
        return await self._run(lambda: self._inspect(engine_id), engine_id)

    async def is_current(self, engine_id: UUID, image: str) -> bool:
        # A module has no versions: what runs is what was asked for.
        instance = await self.inspect(engine_id)
        return instance is not None and instance.state is InstanceState.RUNNING

    async def stop(self, engine_id: UUID, *, grace_s: float) -> None:
        if await self._run(lambda: self._terminate(engine_id), engine_id):
            await await_exit(self.inspect, engine_id, grace_s=grace_s)
            await self._run(lambda: self._stop(engine_id), engine_id)

    async def freeze(self, engine_id: UUID) -> None:
        await self._run(lambda: self._freeze(engine_id), engine_id)

    async def thaw(self, engine_id: UUID) -> Instance | None:
        return await self._run(lambda: self._thaw(engine_id), engine_id)

    async def usage(self, engine_id: UUID) -> Usage:
        return Usage(cpu_s=await self._run(lambda: self._processes.cpu_s(engine_id), engine_id), network_bytes=0)

    async def remove(self, engine_id: UUID, *, volume: bool) -> None:
        await self._run(lambda: self._remove(engine_id, volume=volume), engine_id)

    async def _run(self, call: Callable[[], T], engine_id: UUID | None = None) -> T:
        def translated() -> T:
            try:
                return call()
            except OSError as exc:
                raise BackendError("this host refused to run the engine") from exc

        return await self._threads.run(translated, engine_id)

    def _open(self) -> None:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        empty_all_trash(self._data_dir)
        self._processes.engines()

    def _create(self, spec: EngineSpec) -> None:
        _check_module(spec.image)
        directory = self._directory(spec.engine_id)
        directory.path.mkdir(mode=0o700, exist_ok=True)
        with directory.locked(self._timeout_s) as there:
            if not there:
                raise Unavailable("the engine is just being removed")
            marker = directory.marker()
            if marker is not None and marker.installation != self._installation:
                raise BackendError("the engine's directory belongs to another installation")
            if marker is not None and marker.state is not MarkerState.REMOVED:
                if marker.generation == spec.generation:
                    return
                refuse_older(spec, marker.generation)
                if marker.state is not MarkerState.CREATED:
                    self._processes.kill(spec.engine_id, self._timeout_s)
            directory.volume.mkdir(mode=0o700, exist_ok=True)
            reached("process.directory")
            directory.write(self._marker(spec.generation, MarkerState.CREATED))

    def _start(self, spec: EngineSpec) -> None:
        _check_module(spec.image)
        directory = self._directory(spec.engine_id)
        with directory.locked(self._timeout_s) as there:
            marker = self._own_marker(directory) if there else None
            if marker is None or marker.state is MarkerState.REMOVED or marker.generation < spec.generation:
                raise Unavailable("the engine's instance is gone")
            refuse_older(spec, marker.generation)
            if marker.state is not MarkerState.CREATED:
                if found := self._processes.find(spec.engine_id):
                    if found.frozen:
                        found.signal(signal.SIGCONT)
                    return
                # Children that outlived the engine could keep its port and its database.
                self._processes.kill(spec.engine_id, self._timeout_s)
            if not _can_listen(spec.port):
                directory.write(self._marker(spec.generation, MarkerState.REMOVED))
                raise PortTaken
            directory.write(self._marker(spec.generation, MarkerState.STARTING))
            reached("process.starting")
            self._spawn(spec, directory)
            reached("process.spawned")
            directory.write(self._marker(spec.generation, MarkerState.STARTED))

    def _spawn(self, spec: EngineSpec, directory: EngineDirectory) -> None:
        environment = {
            **spec.environment,
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'gen' / 'python'}",
            "PYTHONSAFEPATH": "1",  # The working directory is the engine's to write, not to import from.
            "HOST": "127.0.0.1",
            "PORT": str(spec.port),
            "SQLITE_DB_PATH": str(directory.volume / "brain.sqlite"),
        }
        if self._catalog_dir is not None:
            environment["CATALOG_DIR"] = str(self._catalog_dir)
        self._processes.spawn(
            spec.engine_id, spec.generation, spec.image, environment, cwd=directory.volume, log=directory.log
        )

    def _inspect(self, engine_id: UUID) -> Instance | None:
        marker = self._own_marker(self._directory(engine_id))
        spawned = marker is None or marker.state is not MarkerState.CREATED
        if spawned and (found := self._processes.find(engine_id)):
            return _running(found)
        return _silent(engine_id, marker)

    def _freeze(self, engine_id: UUID) -> None:
        with self._directory(engine_id).locked(self._timeout_s):
            self._processes.signal_all(engine_id, signal.SIGSTOP)
            # The signal has been sent, not obeyed.
            deadline = time.monotonic() + self._timeout_s
            while (found := self._processes.find(engine_id)) and not found.frozen and time.monotonic() < deadline:
                time.sleep(_PAUSE_S)

    def _thaw(self, engine_id: UUID) -> Instance | None:
        self._processes.signal_all(engine_id, signal.SIGCONT)
        return self._inspect(engine_id)

    def _terminate(self, engine_id: UUID) -> bool:
        found = self._processes.find(engine_id)
        if found:
            found.signal(signal.SIGTERM)
            found.signal(signal.SIGCONT)  # A frozen one must wake up to end.
        return found is not None

    def _stop(self, engine_id: UUID) -> None:
        with self._directory(engine_id).locked(self._timeout_s):
            self._processes.kill(engine_id, self._timeout_s)

    def _remove(self, engine_id: UUID, *, volume: bool) -> None:
        directory = self._directory(engine_id)
        with directory.locked(self._timeout_s) as there:
            self._processes.kill(engine_id, self._timeout_s)
            reached("process.killed")
            marker = directory.marker() if there else None
            if marker is not None and marker.installation != self._installation:
                return
            if volume and not there:
                directory.empty_trash()  # Of one that was killed while it removed this.
            elif volume:
                directory.destroy()
            elif marker is not None:
                directory.write(self._marker(marker.generation, MarkerState.REMOVED))

    def _directory(self, engine_id: UUID) -> EngineDirectory:
        return EngineDirectory(self._data_dir, engine_id)

    def _marker(self, generation: int, state: MarkerState) -> Marker:
        return Marker(self._installation, generation, state)

    def _own_marker(self, directory: EngineDirectory) -> Marker | None:
        marker = directory.marker()
        return marker if marker is not None and marker.installation == self._installation else None

    def _list(self) -> list[Instance]:
        # Markers first: an engine that is started meanwhile is then found among the processes.
        markers = {one.engine_id: self._own_marker(one) for one in engine_directories(self._data_dir)}
        running = self._processes.engines()
        silent = (_silent(engine_id, marker) for engine_id, marker in markers.items() if engine_id not in running)
        return [*map(_running, running.values()), *filter(None, silent)]

    async def free_bytes(self) -> int | None:
        return await free_bytes([self._data_dir])

    async def list(self) -> list[Instance]:
        return await self._run(self._list)


def _running(found: EngineProcess) -> Instance:
    state = InstanceState.FROZEN if found.frozen else InstanceState.RUNNING
    return Instance(found.engine_id, found.generation, state)


def _silent(engine_id: UUID, marker: Marker | None) -> Instance | None:
    """What the marker alone says of an engine without a process."""
    match marker:
        case Marker(state=MarkerState.CREATED | MarkerState.STARTING):
            return Instance(engine_id, marker.generation, InstanceState.CREATED)
        case Marker(state=MarkerState.STARTED):
            return Instance(engine_id, marker.generation, InstanceState.EXITED)
    return None


def _check_module(image: str) -> None:
    if not _MODULE.fullmatch(image):
        raise BackendError(f"image {image!r} is not the name of a Python module")


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        # On Linux it lets past what old connections left in TIME_WAIT, but no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True
