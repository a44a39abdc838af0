"""Rules for instances that every backend keeps."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState
from services.shared.errors import BackendError

# A frozen one too: it may not have woken up yet to hear the signal.
_ALIVE = (InstanceState.RUNNING, InstanceState.FROZEN)
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


def refuse_older(spec: EngineSpec, generation: int) -> None:
    """Fences off a worker that was asleep while another one made the engine anew.

    Raises:
        BackendError: there is an instance of a later generation than that of `spec`.
    """
    if generation > spec.generation:
        raise BackendError("a newer instance of the engine exists")


async def await_exit(inspect: Callable[[UUID], Awaitable[Instance | None]], engine_id: UUID, *, grace_s: float) -> None:
    """Returns when the engine no longer runs, or after `grace_s` seconds.

    Asks again and again, so that an engine that takes its time holds no thread meanwhile.
    """
    deadline = time.monotonic() + grace_s
    pause = _FIRST_PAUSE_S
    while (instance := await inspect(engine_id)) and instance.state in _ALIVE:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        await asyncio.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
