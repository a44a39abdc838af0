"""When an engine is taken for ill, and when it is rather the prober."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

# More of them silent at once have something in common, and that is more likely the prober's network.
_MOST_SILENT = 0.3


@dataclass(frozen=True, slots=True)
class Patient:
    """A running engine as it was when its probe began.

    Args:
        failures: probes failed in a row before this one.
        since: when this run of the engine began; what a probe says holds for this run alone.
    """

    engine_id: UUID
    url: str
    failures: int
    since: datetime


def prober_is_ill(silent: int, probed: int) -> bool:
    """Whether engines that run and do not answer say more about the prober than about themselves.

    Args:
        silent: engines that the backend calls running and that failed their probe.
        probed: engines of the same sweep.
    """
    return silent >= 2 and silent > _MOST_SILENT * probed
