"""A backup: a directory with the registry, a copy of every engine's volume, and a manifest.

Each engine stands still while its volume is copied, and nothing else is done to it: the copy is what
a power failure at that moment would have left, from which SQLite recovers. Engines are copied one
after the other, and the registry last, so that it knows every engine of which there is a copy. What
was made meanwhile, and has none, is listed and does not come back; a copy of what was destroyed
meanwhile is dropped.

Keys of engines are in it as they are in the registry, encrypted; the master key is not in it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from uuid import UUID

from services.provisioner.backends.base import Backend, InstanceState
from services.provisioner.backends.volumes import Volumes
from services.provisioner.backup_manifest import (
    Manifest,
    begin,
    contents_of,
    drop_volume,
    registry_file,
    volume_file,
    write,
)
from services.provisioner.domain.operation import LeaseLost, Outcome
from services.shared.errors import BackendError, ServiceError

# What is being done to an engine may take as long as a boot.
_PATIENCE_S = 120.0
_PAUSE_S = 0.2
LEASE_S = 15.0


class Contents(Protocol):
    @property
    def installation_id(self) -> UUID: ...
    @property
    def migrations(self) -> list[str]: ...
    @property
    def products(self) -> int: ...
    @property
    def engines(self) -> list[UUID]: ...
    @property
    def images(self) -> list[str]: ...


class Registry(Protocol):
    """See the store."""

    async def engines(self) -> list[UUID]: ...
    async def exists(self, engine_id: UUID) -> bool: ...
    async def hold(self, engine_id: UUID) -> UUID | None: ...
    async def renew(self, operation_id: UUID) -> bool: ...
    async def let_go(self, operation_id: UUID, engine_id: UUID, outcome: Outcome) -> None: ...
    async def dump(self, path: Path) -> Contents: ...


@dataclass(frozen=True, slots=True)
class BackedUp:
    """`missing`: engines of which there should be a copy, and why there is none."""

    manifest: Manifest
    missing: dict[UUID, str]


async def back_up(
    directory: Path,
    registry: Registry,
    backend: Backend,
    volumes: Volumes,
    *,
    kind: str,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> BackedUp:
    """Makes a backup in `directory`, which must be empty or not there.

    Args:
        kind: of backend, for the manifest.
        told: how many engines of how many are done.

    Raises:
        Refused, OSError, Unavailable.
    """
    begin(directory)
    copied: set[UUID] = set()
    missing: dict[UUID, str] = {}
    engines = await registry.engines()
    for done, engine_id in enumerate(engines):
        told(done, len(engines))
        try:
            if await _copy(engine_id, directory, registry, backend, volumes):
                copied.add(engine_id)
        except (ServiceError, LeaseLost, TimeoutError) as error:
            drop_volume(directory, engine_id)
            missing[engine_id] = str(error) or "it is busy"
    contents = await registry.dump(registry_file(directory))
    back = sorted(copied & set(contents.engines))
    for engine_id in copied - set(back):
        drop_volume(directory, engine_id)
    manifest = Manifest(
        made_at=datetime.now(UTC),
        installation_id=contents.installation_id,
        backend=kind,
        migrations=contents.migrations,
        products=contents.products,
        engines=back,
        omitted=sorted(set(contents.engines) - copied),
        images=contents.images,
        files=contents_of(directory),
    )
    write(directory, manifest)
    return BackedUp(manifest, {engine_id: why for engine_id, why in missing.items() if engine_id in contents.engines})


async def _copy(engine_id: UUID, directory: Path, registry: Registry, backend: Backend, volumes: Volumes) -> bool:
    """Copies the volume of an engine that stands still; False if the engine is gone.

    Raises:
        TimeoutError: something was done to it all the time.
        LeaseLost: it may not have stood still.
        ServiceError: the backend can't.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (operation_id := await registry.hold(engine_id)) is None:
        if not await registry.exists(engine_id):
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("it is busy")
        await asyncio.sleep(_PAUSE_S)
    outcome, ran = Outcome.FAILED, False
    async with _renewed(registry, operation_id):
        try:
            before = await backend.inspect(engine_id)
            ran = before is not None and before.state is InstanceState.RUNNING
            if ran:
                await _freeze(backend, engine_id)
            await asyncio.to_thread(volumes.save, engine_id, volume_file(directory, engine_id))
            outcome = Outcome.SUCCEEDED
        finally:
            if ran:
                # Should this fail it is not let go: the lease runs out, and a Provisioner thaws it.
                await backend.thaw(engine_id)
            await registry.let_go(operation_id, engine_id, outcome)
    return True


@asynccontextmanager
async def _renewed(registry: Registry, operation_id: UUID) -> AsyncIterator[None]:
    """Renews the lease of the operation until the block ends, or it is lost."""
    lost = False

    async def renew() -> None:
        nonlocal lost
        while not lost:
            await asyncio.sleep(LEASE_S / 4)
            try:
                lost = not await registry.renew(operation_id)
            except ServiceError:
                continue  # The lease says until when that does no harm.

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()


async def _freeze(backend: Backend, engine_id: UUID) -> None:
    """Freezes the engine, which may be frozen after an error as well.

    Raises:
        BackendError: it goes on running.
    """
    await backend.freeze(engine_id)
    now = await backend.inspect(engine_id)
    if now is not None and now.state is InstanceState.RUNNING:
        raise BackendError("it can't be frozen")
