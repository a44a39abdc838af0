"""When failed engines are started again by themselves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Pauses between restarts double, from `backoff_base_s` up to `backoff_max_s` seconds; the last
    of `max_attempts` restarts is the last."""

    backoff_base_s: float
    backoff_max_s: float
    max_attempts: int
