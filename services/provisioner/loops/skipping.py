"""A pass over many engines goes on when one of them can't be dealt with."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import structlog

from services.provisioner.domain.operation import LeaseLost

log = structlog.get_logger(__name__)


@contextmanager
def skipping(engine_id: UUID, event: str = "engine_skipped") -> Iterator[None]:
    """Logs what goes wrong with the engine, and lets the pass go on.

    Args:
        engine_id: which it is.
        event: what the log calls it.

    Raises:
        LeaseLost: the pass is not this process's to make any more.
    """
    try:
        yield
    except LeaseLost:
        raise
    except Exception:
        log.exception(event, engine_id=str(engine_id))
