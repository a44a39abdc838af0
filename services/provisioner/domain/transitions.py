"""What each operation does to an engine's status. The one table: code follows it, docs are drawn from it."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.provisioner.domain.engine import EngineStatus as S
from services.provisioner.domain.operation import OperationKind as K
from services.shared.errors import EngineAlreadyRunning, EngineNotFound, EngineNotRunning, ServiceError


@dataclass(frozen=True, slots=True)
class Transition:
    """One kind of operation.

    Args:
        sources: statuses from which it may begin; none for the making of an engine.
        during: status while it is under way.
        success: status after it; None for no engine.
        failure: status after it has failed or given way; None for no engine.
    """

    sources: frozenset[S]
    during: S
    success: S | None
    failure: S | None


TRANSITIONS: Mapping[K, Transition] = {
    K.PROVISION: Transition(frozenset(), S.PROVISIONING, S.RUNNING, None),
    K.START: Transition(frozenset({S.STOPPED, S.SLEEPING, S.FAILED}), S.PROVISIONING, S.RUNNING, S.FAILED),
    K.WAKE: Transition(frozenset({S.SLEEPING}), S.SLEEPING, S.RUNNING, S.FAILED),
    K.RESTART: Transition(frozenset({S.FAILED}), S.FAILED, S.RUNNING, S.FAILED),
    K.SLEEP: Transition(frozenset({S.RUNNING}), S.SLEEPING, S.SLEEPING, S.RUNNING),
    K.DEEP_SLEEP: Transition(frozenset({S.SLEEPING}), S.SLEEPING, S.SLEEPING, S.SLEEPING),
    K.STOP: Transition(frozenset({S.RUNNING, S.SLEEPING, S.FAILED}), S.STOPPED, S.STOPPED, S.STOPPED),
    K.ROTATE_KEY: Transition(frozenset({S.RUNNING}), S.RUNNING, S.RUNNING, S.FAILED),
    K.DESTROY: Transition(frozenset(S), S.DESTROYING, None, S.DESTROYING),
}

OBSERVED: Mapping[tuple[S, S], str] = {
    (S.RUNNING, S.FAILED): "found unwell",
    (S.RUNNING, S.PROVISIONING): "found ended",
}
"""Changes that begin with what the health loop and the reconciler find, and not with a call."""

BOOTS = frozenset({K.PROVISION, K.START, K.WAKE, K.RESTART})
"""Kinds that end with a running engine, so that a caller who wants one may wait for them."""

YIELDS = frozenset({K.SLEEP, K.DEEP_SLEEP})
"""Kinds that give way as soon as the engine is wanted for anything else."""


def check_begin(kind: K, status: S) -> None:
    """Refuses an operation that can't begin from this status.

    Raises:
        EngineNotFound, EngineAlreadyRunning, EngineNotRunning.
    """
    if status not in TRANSITIONS[kind].sources:
        raise _refusal(kind, status)


def _refusal(kind: K, status: S) -> ServiceError:
    if status is S.DESTROYING:
        return EngineNotFound()
    if kind in BOOTS and status is S.RUNNING:
        return EngineAlreadyRunning("user_id: the engine runs already")
    return EngineNotRunning(f"user_id: the engine is {status}")
