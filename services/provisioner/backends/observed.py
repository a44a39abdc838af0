"""A backend whose every call is measured, and every refusal logged with its reason."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, EngineSpec, Instance, PortTaken, Usage
from services.provisioner.metrics import BACKEND_CALLS
from services.shared.errors import BackendError
from services.shared.tracing import span

log = structlog.get_logger(__name__)


class ObservedBackend:
    """Passes every call on.

    Args:
        backend: what carries them out.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def open(self) -> None:
        with _observed("open"):
            await self._backend.open()

    async def close(self) -> None:
        await self._backend.close()

    async def create(self, spec: EngineSpec) -> None:
        with _observed("create"):
            await self._backend.create(spec)

    async def start(self, spec: EngineSpec) -> str | None:
        with _observed("start"):
            return await self._backend.start(spec)

    async def inspect(self, engine_id: UUID) -> Instance | None:
        with _observed("inspect"):
            return await self._backend.inspect(engine_id)

    async def is_current(self, engine_id: UUID, image: str) -> bool:
        with _observed("is_current"):
            return await self._backend.is_current(engine_id, image)

    async def stop(self, engine_id: UUID, *, grace_s: float) -> None:
        with _observed("stop"):
            await self._backend.stop(engine_id, grace_s=grace_s)

    async def freeze(self, engine_id: UUID) -> None:
        with _observed("freeze"):
            await self._backend.freeze(engine_id)

    async def thaw(self, engine_id: UUID) -> Instance | None:
        with _observed("thaw"):
            return await self._backend.thaw(engine_id)

    async def usage(self, engine_id: UUID) -> Usage:
        with _observed("usage"):
            return await self._backend.usage(engine_id)

    async def remove(self, engine_id: UUID, *, volume: bool) -> None:
        with _observed("remove"):
            await self._backend.remove(engine_id, volume=volume)

    async def free_bytes(self) -> int | None:
        return await self._backend.free_bytes()

    async def list(self) -> list[Instance]:
        with _observed("list"):
            return await self._backend.list()


@contextmanager
def _observed(call: str) -> Iterator[None]:
    begun, result = time.monotonic(), "unavailable"
    try:
        with span(f"backend {call}"):
            yield
        result = "done"
    except PortTaken:
        result = "refused"
        raise
    except BackendError as error:
        result = "refused"
        # What callers are told says nothing of the inside.
        log.warning("backend_refused", call=call, error=error.message, reason=str(error.__cause__ or ""))
        raise
    finally:
        BACKEND_CALLS.labels(call, result).observe(time.monotonic() - begun)
