"""What it takes to make a row and its instance agree: every status with every state."""

from uuid import uuid4

import pytest

from services.provisioner.backends.base import InstanceState
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import OperationKind as K
from services.provisioner.domain.registered import Registered
from services.provisioner.loops.reconciler import repair_of

CREATED, RUNNING, FROZEN, EXITED = InstanceState
STATES = (None, CREATED, EXITED, RUNNING, FROZEN)


@pytest.mark.parametrize(
    ("status", "deep_asleep", "changes"),
    [
        ("running", False, (K.START, K.START, K.START, None, K.START)),
        ("sleeping", False, (True, True, True, K.WAKE, None)),
        ("sleeping", True, (None, None, None, K.WAKE, False)),
        ("stopped", False, (None, None, None, K.STOP, K.STOP)),
        # The health loop's.
        ("failed", False, (None, None, None, None, None)),
        ("provisioning", False, (K.START, K.START, K.START, K.START, K.START)),
        ("destroying", False, (K.DESTROY, K.DESTROY, K.DESTROY, K.DESTROY, K.DESTROY)),
        # Of a later version.
        ("hibernating", False, (None, None, None, None, None)),
    ],
)
def test_repairs(status: str, deep_asleep: bool, changes: tuple[K | bool | None, ...]) -> None:
    row = Registered(uuid4(), status, deep_asleep, busy=False)
    repairs = [repair_of(row, state) for state in STATES]
    assert tuple(None if repair is None else repair.change for repair in repairs) == changes


def test_every_status_is_tried() -> None:
    tried = {mark.args[1][i][0] for mark in test_repairs.pytestmark for i in range(len(mark.args[1]))}  # type: ignore[attr-defined]
    assert tried >= set(EngineStatus)
