"""Engines among the processes of this machine, known by the labels in their environment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil

from services.shared.errors import Unavailable

_INSTALLATION = "SEPTEMBER_INSTALLATION"
_ENGINE_ID = "SEPTEMBER_ENGINE_ID"
_GENERATION = "SEPTEMBER_GENERATION"
_PAUSE_S = 0.002


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A process that carries the labels: an engine, or a child that inherited its environment.

    Args:
        process: knows its creation time too, so that a pid given to another is noticed.
        leads: it leads a session, as an engine does and a child of one rarely.
        created: moment of its creation, only to compare.
    """

    process: psutil.Process
    engine_id: UUID
    generation: int
    leads: bool
    created: float

    @property
    def frozen(self) -> bool:
        try:
            return bool(self.process.status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def signal(self, signum: signal.Signals) -> None:
        """To its whole group if it leads one; nothing if it has ended."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if self.leads:
                os.killpg(self.process.pid, signum)
            else:
                self.process.send_signal(signum)


class EngineProcesses:
    """Spawns, finds and ends the processes of one installation.

    What it remembers only saves time: a process that another one started is found all the same.
    """

    def __init__(self, installation: str) -> None:
        self._installation = installation
        self._seen: dict[UUID, EngineProcess] = {}
        self._children: set[int] = set()

    def spawn(
        self, engine_id: UUID, generation: int, module: str, environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        """Runs `module` in a session of its own; returns when other processes can find it."""
        labels = {_INSTALLATION: self._installation, _ENGINE_ID: str(engine_id), _GENERATION: str(generation)}
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=cwd,
                env={**environment, **labels},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # For a moment after exec the environment is not there yet for others to read.
        while (found := self._read(child.pid)) is None and child.poll() is None:
            time.sleep(_PAUSE_S)
        if found is not None:
            self._seen[engine_id] = found
            self._children.add(child.pid)
        child.returncode = 0  # From here on it is waited for by its pid, or outlives us: no concern of Popen's.

    def find(self, engine_id: UUID) -> EngineProcess | None:
        """The engine itself. Looks at all processes only if it isn't where it was seen last."""
        seen = self._seen.get(engine_id)
        if seen is not None and self._is_alive(seen):
            return seen
        return self.engines().get(engine_id)

    def engines(self) -> dict[UUID, EngineProcess]:
        """All engines that run. If a child too leads a session, the older leader is the engine."""
        self._reap()
        found: dict[UUID, EngineProcess] = {}
        for one in self._scan():
            if one.leads:
                found.setdefault(one.engine_id, one)
        # Not what is returned: another thread may spawn one while the caller goes through these.
        self._seen = found.copy()
        return found

    def signal_all(self, engine_id: UUID, signum: signal.Signals) -> None:
        """To every process of the engine."""
        for one in self._scan():
            if one.engine_id == engine_id:
                one.signal(signum)

    def cpu_s(self, engine_id: UUID) -> float:
        """Seconds of processor time that the engine and its children have used."""
        total = 0.0
        for one in self._scan():
            if one.engine_id == engine_id:
                with suppress(psutil.NoSuchProcess):
                    times = one.process.cpu_times()
                    total += times.user + times.system
        return total

    def kill(self, engine_id: UUID, timeout_s: float) -> None:
        """Ends every process of the engine, also children that outlived it or left its session.

        Raises:
            Unavailable: one is still there after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while left := [one for one in self._scan() if one.engine_id == engine_id]:
            for one in left:
                one.signal(signal.SIGKILL)
            while any(self._is_alive(one) for one in left):
                if time.monotonic() > deadline:
                    raise Unavailable("the engine does not end")
                time.sleep(_PAUSE_S)

    def _scan(self) -> list[EngineProcess]:
        """Every process with the label, the oldest first.

        One between fork and exec still has its parent's environment and is missed.
        """
        found = (self._read(pid) for pid in psutil.pids())
        return sorted((one for one in found if one), key=lambda one: one.created)

    def _read(self, pid: int) -> EngineProcess | None:
        """None if the process isn't ours, or has ended."""
        try:
            process = psutil.Process(pid)
            environment = process.environ()
            if environment.get(_INSTALLATION) != self._installation:
                return None
            return EngineProcess(
                process,
                UUID(environment[_ENGINE_ID]),
                int(environment[_GENERATION]),
                leads=os.getsid(pid) == pid,
                created=process.create_time(),
            )
        except (psutil.Error, ProcessLookupError, KeyError, ValueError):
            return None

    def _is_alive(self, found: EngineProcess) -> bool:
        self._reap()
        try:
            # The zombie of a child of ours is reaped when the last of its threads has ended: only
            # then its port is free.
            return found.process.is_running() and (
                found.process.pid in self._children or found.process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False

    def _reap(self) -> None:
        for pid in self._children.copy():
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended = pid
            if ended:
                self._children.discard(pid)
