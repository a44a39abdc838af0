"""What carrying operations out needs of the rest: the store, the backend, and engines over HTTP."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.provisioner.backends.base import Backend
from services.provisioner.domain.engine import Engine
from services.provisioner.domain.operation import Operation, Outcome, Settled, Step
from services.shared.errors import ServiceError

__all__ = ["Backend", "EngineClient", "EngineHealth", "OperationLog"]


class OperationLog(Protocol):
    """What is known of an operation and its engine, and what is written of it; see the store."""

    async def engine(self, engine_id: UUID) -> Engine: ...
    async def set_step(self, operation: Operation, step: Step, failure: ServiceError | None = None) -> None: ...
    async def pin_image(self, operation: Operation, image_id: str | None) -> None: ...
    async def set_probes(self, operation: Operation, probes: int) -> None: ...
    async def swap_port(self, operation: Operation, engine: Engine) -> bool: ...
    async def clock(self) -> datetime: ...
    async def all_flushed(self, since: datetime) -> bool: ...
    async def wanted(self, operation: Operation) -> str | None: ...
    async def set_pending_key(self, operation: Operation, encrypted_key: bytes) -> None: ...
    async def recreate_with_pending_key(self, operation: Operation) -> None: ...
    async def finish(self, operation: Operation, outcome: Outcome, failure: ServiceError | None = None) -> Settled: ...


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """What an engine says of itself; `active` if it says that it is at work."""

    healthy: bool
    active: bool


class EngineClient(Protocol):
    """Talks to engines over HTTP."""

    async def health(self, url: str) -> EngineHealth:
        """How the engine at this URL is; not healthy if it does not answer in time."""
        ...

    async def rotate_key(self, url: str, key: str, new_key_hash: str, overlap_s: float) -> int:
        """Tells the engine the hash of a new key, showing a key that it takes.

        Returns:
            The status of its answer; 0 if there was none.
        """
        ...
