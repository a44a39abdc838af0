"""What the Provisioner needs of the thing that runs engines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that a backend needs to make one engine.

    Args:
        engine_id: names the container and the volume.
        generation: counts the times that the engine was made anew; an older instance is replaced.
        image: what to run: the name or the id of a local image of Docker, a Python module for the process backend.
        port: port on 127.0.0.1 at which the engine is reached from this host.
        environment: what the engine is told besides the paths of its mounts.
    """

    engine_id: UUID
    generation: int
    image: str
    port: int
    environment: Mapping[str, str] = field(repr=False)


class InstanceState(StrEnum):
    """What the backend itself says of an instance."""

    CREATED = "created"
    RUNNING = "running"
    FROZEN = "frozen"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine as it exists outside of the registry."""

    engine_id: UUID
    generation: int
    state: InstanceState


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance has used since it was started.

    Args:
        cpu_s: processor time of all its processes, in seconds.
        network_bytes: bytes received and sent; 0 where the backend can't tell.
    """

    cpu_s: float
    network_bytes: int


class PortTaken(Exception):
    """The host refuses the spec's port; another one may do."""


class Backend(Protocol):
    """Makes, runs and removes engines that carry this installation's label.

    Every method is idempotent, may be repeated after a crash at any line, and touches nothing
    without the label. Errors: `BackendError` when refused for good, `Unavailable` when the backend
    can't be reached or did not answer in time.
    """

    async def open(self) -> None:
        """Connects and makes what all engines share, the network for example."""

    async def close(self) -> None:
        """Ends what `open` made; engines go on."""

    async def create(self, spec: EngineSpec) -> None:
        """Makes the instance of this generation with its volume, not started.

        An instance of an older generation, or one that is not as closed as an engine has to be, is
        removed first; its volume is kept.
        """

    async def start(self, spec: EngineSpec) -> str | None:
        """Starts the created or exited instance, thaws the frozen one; a running one is left alone.

        Returns:
            The id of the image that it was made of; None for a backend whose images have none.

        Raises:
            PortTaken: the host refuses the port. The instance is removed again, its volume kept.
        """

    async def inspect(self, engine_id: UUID) -> Instance | None:
        """What there is of this engine; None for nothing."""

    async def is_current(self, engine_id: UUID, image: str) -> bool:
        """Whether the instance runs, and was made of what the image's name stands for now."""

    async def stop(self, engine_id: UUID, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` seconds. The instance and its volume are kept."""

    async def freeze(self, engine_id: UUID) -> None:
        """Stops the running instance where it is, with all of its processes; its memory is kept.

        Nothing is said of an instance that isn't running: look at it afterwards.
        """

    async def thaw(self, engine_id: UUID) -> Instance | None:
        """Lets a frozen instance go on, one in any other state is left alone; returns what there is then."""

    async def usage(self, engine_id: UUID) -> Usage:
        """What the instance has used; nothing if it is not there."""

    async def remove(self, engine_id: UUID, *, volume: bool) -> None:
        """Removes the instance, by force, and its volume if asked; nothing there is fine."""

    async def free_bytes(self) -> int | None:
        """Room that is left for engines' data, in bytes; None if this host doesn't see where it is."""

    async def list(self) -> list[Instance]:
        """Every instance with this installation's label, in whatever state."""
