"""How loops begin what the platform does of its own accord."""

from typing import Protocol
from uuid import UUID

from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.intent import Pending
from services.provisioner.domain.operation import OperationKind


class Begin(Protocol):
    """Writes operations."""

    async def begin(
        self, engine_id: UUID, kind: OperationKind, expected: EngineStatus, *, reason: str | None = None
    ) -> Pending | None: ...
