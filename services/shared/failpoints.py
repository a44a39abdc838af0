"""Points between two effects, at which a test breaks the process.

Only for tests, and no setting: unless `ORCH_FAILPOINTS` names a directory when the process starts, a
point is a call that returns. Else the first process to come to a point takes away the symbolic link
of its name from there, if it finds one, and does what the link says: `SIGKILL` and `SIGSTOP` are sent
to the process itself, `raise` fails as a bug would. So each link breaks one process, once.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

VARIABLE = "ORCH_FAILPOINTS"

Point = Literal[
    "intent.written",
    "operation.claimed",
    "operation.finished",
    "boot.creating",
    "boot.created",
    "boot.starting",
    "boot.started",
    "boot.probing",
    "boot.healthy",
    "boot.port_swapped",
    "boot.thawed",
    "boot.undoing",
    "boot.undone",
    "restart.ended",
    "stop.begun",
    "stop.signalled",
    "stop.ended",
    "destroy.begun",
    "destroy.removed",
    "sleep.announced",
    "sleep.freezing",
    "sleep.frozen",
    "sleep.thawed",
    "rotate.pending",
    "rotate.told",
    "rotate.shown",
    "rotate.recreating",
    "rotate.stopped",
    "rotate.undone",
    "pool.refilled",
    "pool.looked",
    "pool.claimed",
    "pool.dropped",
    "key.claimed",
    "key.acted",
    "key.kept",
    "reconcile.listed",
    "reconcile.begun",
    "reconcile.removed",
    "health.marked",
    "restarter.begun",
    "sleeper.begun",
    "process.directory",
    "process.starting",
    "process.spawned",
    "process.killed",
    "process.trashed",
    "docker.outdated_removed",
    "docker.container_removed",
    "migration.applied",
    "migration.committed",
    "rekey.replaced",
]
"""Where they are, each named for what has just been done."""


class FailpointRaised(Exception):
    """What a bug would raise."""


def _pass(point: Point) -> None:
    """Goes on."""


def _armed(directory: Path) -> Callable[[Point], None]:
    unknown = {link.name for link in directory.iterdir()}.difference(get_args(Point))
    if unknown:
        sys.exit(f"{VARIABLE}: there is no such failpoint: {', '.join(sorted(unknown))}")

    def reach(point: Point) -> None:
        with suppress(FileNotFoundError):
            action = (directory / point).readlink()
            (directory / point).unlink()
            if action.name == "raise":
                raise FailpointRaised(point)
            os.kill(os.getpid(), signal.Signals[action.name])

    return reach


# Chosen when the process starts: nobody can turn them on in one that runs without.
reached = _armed(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else _pass
