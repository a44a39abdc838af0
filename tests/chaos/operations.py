"""Every operation: how an engine is brought to where it begins, what begins it, and the failpoints that it passes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.shared.failpoints import Point

_CALLED: tuple[Point, ...] = ("intent.written", "operation.claimed", "operation.finished", "key.acted", "key.kept")
_STARTS: tuple[Point, ...] = (
    "boot.creating",
    "boot.created",
    "boot.starting",
    "process.starting",
    "process.spawned",
    "boot.started",
    "boot.probing",
    "boot.healthy",
)


@dataclass(frozen=True)
class Operation:
    """Args:
    points: that it passes.
    prepared: what is done before it, by the names of `Subject`.
    happens: what begins it by itself, by the names of `Subject`.
    call: that begins it.
    image: what the engine runs.
    refusal: code of the error that the caller is given.
    after: status of the engine when all is done; None for no engine.
    pool: whether there is a warm pool.
    """

    points: tuple[Point, ...]
    prepared: tuple[str, ...] = ("Provision",)
    happens: str = ""
    call: str = ""
    image: str = ""
    refusal: str | None = None
    after: str | None = "running"
    pool: bool = False


OPERATIONS: Mapping[str, Operation] = {
    "provision": Operation((*_CALLED, *_STARTS, "process.directory"), (), call="Provision"),
    "provision that fails": Operation(
        ("boot.undoing", "boot.undone", "process.killed", "process.trashed"),
        (),
        call="Provision",
        image="tests.engines.exits",
        refusal="BACKEND_ERROR",
        after=None,
    ),
    "start": Operation((*_CALLED, *_STARTS), ("Provision", "Stop"), call="Start"),
    "start that fails": Operation(
        ("boot.undoing", "boot.undone", "stop.signalled"),
        ("Provision", "Stop"),
        call="Start",
        image="tests.engines.fragile",
        refusal="BACKEND_ERROR",
        after="failed",
    ),
    "start at a port that is taken": Operation(
        ("boot.port_swapped",), ("Provision", "Stop", "take_port"), call="Start"
    ),
    "wake": Operation((*_CALLED, "boot.thawed"), ("Provision", "Sleep"), call="Wake"),
    "wake from deep sleep": Operation(_STARTS, ("Provision", "Sleep", "sleep_long", "is_deep_asleep"), call="Wake"),
    "restart": Operation(
        ("health.marked", "restarter.begun", "operation.claimed", "stop.signalled", "restart.ended", *_STARTS),
        happens="sicken",
        image="tests.engines.sick",
    ),
    "sleep": Operation((*_CALLED, "sleep.announced", "sleep.freezing", "sleep.frozen"), call="Sleep", after="sleeping"),
    "sleep of one that is kept awake": Operation(
        ("sleep.announced", "sleep.thawed"), ("Provision", "keep_awake"), call="Sleep", refusal="UNAVAILABLE"
    ),
    "deep sleep": Operation(
        ("sleeper.begun", "operation.claimed", "stop.begun", "stop.signalled", "stop.ended", "operation.finished"),
        ("Provision", "Sleep"),
        "sleep_long",
        after="sleeping",
    ),
    "stop": Operation((*_CALLED, "stop.begun", "stop.signalled", "stop.ended"), call="Stop", after="stopped"),
    "rotate": Operation((*_CALLED, "rotate.pending", "rotate.told", "rotate.shown"), call="RotateKey"),
    "rotate without the endpoint": Operation(
        ("rotate.pending", "rotate.recreating", "rotate.stopped", "process.directory", *_STARTS),
        call="RotateKey",
        image="tests.engines.no_rotation",
    ),
    "rotate that fails": Operation(
        ("rotate.undone",),
        call="RotateKey",
        image="tests.engines.fragile_no_rotation",
        refusal="BACKEND_ERROR",
        after="failed",
    ),
    "destroy": Operation(
        (*_CALLED, "destroy.begun", "process.killed", "process.trashed", "destroy.removed"), call="Destroy", after=None
    ),
    "repair": Operation(("reconcile.listed", "reconcile.begun"), happens="freeze"),
    "removal of a stray": Operation(("reconcile.removed",), happens="forget", after=None),
    "claim from the pool": Operation(
        ("pool.looked", "pool.claimed", "intent.written", "key.acted"), (), call="Provision", pool=True
    ),
    "refill of the pool": Operation(
        ("pool.refilled", "operation.claimed", "operation.finished", *_STARTS), (), call="Provision", pool=True
    ),
    "drop from the pool": Operation(("pool.dropped", "destroy.begun"), (), "kill_member", "Provision", pool=True),
}

ELSEWHERE: frozenset[Point] = frozenset(
    {
        "key.claimed",
        "migration.applied",
        "migration.committed",
        "rekey.replaced",
        "docker.outdated_removed",
        "docker.container_removed",
    }
)
"""Failpoints that these operations, on the process backend, do not pass: they have tests of their own."""


class Case(NamedTuple):
    """A kill of the operation at the point."""

    operation: str
    point: Point


def cases(seed: int) -> list[Case]:
    """Each failpoint at least once, in a third of the operations that pass it: three seeds make all of them."""
    passing: defaultdict[Point, list[str]] = defaultdict(list)
    for name, operation in OPERATIONS.items():
        for point in operation.points:
            passing[point].append(name)
    chosen = []
    for point, names in passing.items():
        first = seed % min(3, len(names))
        chosen += [Case(name, point) for name in names[first::3]]
    return sorted(chosen)
