"""Engines as containers of the local Docker daemon."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog
from docker import APIClient
from docker.errors import APIError, NotFound

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState, PortTaken, Usage
from services.provisioner.backends.disk import free_bytes, warn_of_unseen
from services.provisioner.backends.docker_client import connected
from services.provisioner.backends.docker_errors import (
    is_conflict,
    is_network_gone,
    is_not_paused,
    is_port_refused,
    is_refused,
    translated,
)
from services.provisioner.backends.engine_network import EngineNetwork
from services.provisioner.backends.engine_template import (
    INSTALLATION_LABEL,
    EngineTemplate,
    container_name,
    copier_name,
    volume_name,
)
from services.provisioner.backends.hardening import deviations
from services.provisioner.backends.instances import await_exit, refuse_older
from services.provisioner.backends.threads import BackendThreads
from services.shared.errors import BackendError, Unavailable
from services.shared.failpoints import reached

T = TypeVar("T")

log = structlog.get_logger(__name__)

_PAUSE_S = 0.1
# A client's address of a daemon on this host, whose directories it sees.
_BY_SOCKET = "http+docker://localhost"


@dataclass(frozen=True, slots=True)
class _Container:
    """What has the name of an engine's container; `instance` is None if it isn't ours."""

    id: str
    image_id: str
    instance: Instance | None


class DockerBackend:
    """Runs a container `engine-<id>` with a volume `engine-data-<id>` for every engine.

    Docker may do what it was asked although the answer was lost; the name is then taken. So every
    change begins with a look at what there is, and a conflict leads to another look.

    Images are never pulled: what may run is what is there.

    Args:
        installation: label of what is ours; nothing else is touched.
        network: bridge network of all engines.
        catalog_mount: directory on the host that engines find, read-only, at `/catalog`.
        threads: calls at the same time.
        timeout_s: seconds for one call.
        memory_bytes: memory of an engine, swap included.
        cpus: processors of an engine.
        pids: processes and threads of an engine.
        base_url: address of the daemon; None for that of the environment.
    """

    def __init__(
        self,
        installation: str,
        network: str,
        catalog_mount: Path | None = None,
        *,
        threads: int = 8,
        timeout_s: float = 30.0,
        memory_bytes: int = 512 * 1024 * 1024,
        cpus: float = 1.0,
        pids: int = 256,
        base_url: str | None = None,
    ) -> None:
        self._installation = installation
        self._network = network
        self._template = EngineTemplate(installation, network, catalog_mount, memory_bytes, cpus, pids)
        self._timeout_s = timeout_s
        self._base_url = base_url
        self._client: APIClient | None = None
        # What this process has frozen: found to be ours then, and labels never change.
        self._frozen: dict[UUID, _Container] = {}
        self._directories: list[Path] = []
        self._threads = BackendThreads(threads, timeout_s)

    async def open(self) -> None:
        await self._run(self._open)

    async def close(self) -> None:
        self._threads.close()
        if self._client is not None:
            self._client.close()

    async def create(self, spec: EngineSpec) -> None:
        await self._run(lambda: self._create(spec), spec.engine_id)

    async def start(self, spec: EngineSpec) -> str | None:
        return await self._run(lambda: self._start(spec), spec.engine_id)

    async def inspect(self, engine_id: UUID) -> Instance | None:
        found = await self._run(lambda: self._look(engine_id), engine_id)
        return found.instance if found else None

    async def is_current(self, engine_id: UUID, image: str) -> bool:
        return await self._run(lambda: self._is_current(engine_id, image), engine_id)

    async def stop(self, engine_id: UUID, *, grace_s: float) -> None:
        await self._run(lambda: self._signal(engine_id, "SIGTERM"), engine_id)
        await await_exit(self.inspect, engine_id, grace_s=grace_s)
        await self._run(lambda: self._signal(engine_id, "SIGKILL"), engine_id)

    async def freeze(self, engine_id: UUID) -> None:
        await self._run(lambda: self._freeze(engine_id), engine_id)

    async def thaw(self, engine_id: UUID) -> Instance | None:
        return await self._run(lambda: self._thaw_engine(engine_id), engine_id)

    async def usage(self, engine_id: UUID) -> Usage:
        return await self._run(lambda: self._usage(engine_id), engine_id)

    async def remove(self, engine_id: UUID, *, volume: bool) -> None:
        await self._run(lambda: self._remove(engine_id, volume=volume), engine_id)

    async def _run(self, call: Callable[[], T], engine_id: UUID | None = None) -> T:
        return await self._threads.run(translated()(call), engine_id)

    @property
    def _api(self) -> APIClient:
        if self._client is None:
            raise Unavailable("the container service can't be reached")
        return self._client

    def _open(self) -> None:
        self._client = connected(self._timeout_s, self._base_url)
        if self._client.base_url == _BY_SOCKET:
            # Volumes may have a file system of their own.
            root = Path(self._client.info()["DockerRootDir"])
            self._directories = [root, root / "volumes"]
            warn_of_unseen(self._directories)
        EngineNetwork(self._network, self._installation, self._timeout_s).open(self._api)

    def _create(self, spec: EngineSpec) -> None:
        if self._volume_owner(spec.engine_id) not in (None, self._installation):
            raise BackendError("the engine's volume belongs to another installation")
        deadline = time.monotonic() + self._timeout_s
        while not self._make_container(spec):
            if time.monotonic() > deadline:
                raise Unavailable("the engine is busy with another operation")
            time.sleep(_PAUSE_S)

    def _make_container(self, spec: EngineSpec) -> bool:
        """False if another call got ahead with the name: look again."""
        options = self._template.options(self._api, spec)
        shown = self._show(spec.engine_id)
        if shown is not None:
            found = self._container(shown)
            if found.instance is None:
                raise BackendError("the engine's name belongs to another installation")
            if found.instance.generation == spec.generation:
                differing = deviations(shown, options)
                if not differing:
                    return True
                log.warning("engine_made_anew", engine_id=str(spec.engine_id), differing=differing)
            refuse_older(spec, found.instance.generation)
            self._remove_container(found.id)
            reached("docker.outdated_removed")
        try:
            self._api.create_container(**options)
        except NotFound as exc:
            raise BackendError(f"image {spec.image!r} is not available") from exc
        except APIError as exc:
            if not is_conflict(exc):
                raise
            return False
        return True

    def _start(self, spec: EngineSpec) -> str:
        found = self._look(spec.engine_id)
        if found is None or found.instance is None or found.instance.generation < spec.generation:
            raise Unavailable("the engine's instance is gone")
        refuse_older(spec, found.instance.generation)
        if found.instance.state is InstanceState.FROZEN:
            self._thaw(found.id)
        elif found.instance.state is not InstanceState.RUNNING:
            try:
                self._api.start(found.id)
            except APIError as exc:
                if is_port_refused(exc):
                    self._remove_container(found.id)
                    raise PortTaken from exc
                if is_network_gone(exc):
                    self._remove_container(found.id)
                    raise Unavailable("the engine's instance is gone") from exc
                raise
        return found.image_id

    def _is_current(self, engine_id: UUID, image: str) -> bool:
        found = self._look(engine_id)
        if found is None or found.instance is None or found.instance.state is not InstanceState.RUNNING:
            return False
        try:
            current = self._api.inspect_image(image)["Id"]  # type: ignore[no-untyped-call]
        except NotFound:
            return False
        return bool(found.image_id == current)

    def _signal(self, engine_id: UUID, signal: str) -> None:
        found = self._look(engine_id)
        if found is None or found.instance is None:
            return
        if found.instance.state is InstanceState.FROZEN:
            self._thaw(found.id)  # It must wake up to hear the signal.
        elif found.instance.state is not InstanceState.RUNNING:
            return
        try:
            self._api.kill(found.id, signal)
        except APIError as exc:
            if not is_conflict(exc):  # It has not ended meanwhile.
                raise

    def _freeze(self, engine_id: UUID) -> None:
        found = self._look(engine_id)
        if found is not None and found.instance is not None and found.instance.state is InstanceState.RUNNING:
            try:
                self._api.pause(found.id)
            except APIError as exc:
                if is_refused(exc):
                    raise BackendError("it could not be frozen") from exc
                if not is_conflict(exc):  # It has not ended, or been frozen, meanwhile.
                    raise
            self._frozen[engine_id] = found

    def _thaw_engine(self, engine_id: UUID) -> Instance | None:
        frozen = self._frozen.pop(engine_id, None)
        if frozen is not None:
            with suppress(APIError):  # Another process has dealt with it since.
                self._api.unpause(frozen.id)
                return frozen.instance  # It ran when it was found.
        found = self._look(engine_id)
        if found is None or found.instance is None or found.instance.state is not InstanceState.FROZEN:
            return found.instance if found else None
        self._thaw(found.id)
        return replace(found.instance, state=InstanceState.RUNNING)

    def _usage(self, engine_id: UUID) -> Usage:
        found = self._look(engine_id)
        if found is None or found.instance is None:
            return Usage(cpu_s=0, network_bytes=0)
        stats = self._api.stats(found.id, stream=False, one_shot=True)
        networks = stats.get("networks") or {}
        return Usage(
            cpu_s=stats["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9,
            network_bytes=sum(one["rx_bytes"] + one["tx_bytes"] for one in networks.values()),
        )

    def _thaw(self, container_id: str) -> None:
        try:
            self._api.unpause(container_id)
        except APIError as exc:
            if not is_not_paused(exc):
                raise

    def _remove(self, engine_id: UUID, *, volume: bool) -> None:
        self._frozen.pop(engine_id, None)
        found = self._look(engine_id)
        if found is not None and found.instance is not None:
            self._remove_container(found.id)
            reached("docker.container_removed")
        if volume and self._volume_owner(engine_id) == self._installation:
            self._remove_container(copier_name(engine_id))  # A backup that died may have left it.
            self._until_gone(lambda: self._api.remove_volume(volume_name(engine_id)))

    def _remove_container(self, container_id: str) -> None:
        # `v` means the nameless volumes that an image may declare; the engine's has a name and is kept.
        self._until_gone(lambda: self._api.remove_container(container_id, force=True, v=True))

    def _until_gone(self, remove: Callable[[], object]) -> None:
        """Repeats `remove` while Docker says that another removal or use isn't over yet."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                remove()
                return
            except NotFound:
                return
            except APIError as exc:
                if not is_conflict(exc) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_S)

    def _look(self, engine_id: UUID) -> _Container | None:
        shown = self._show(engine_id)
        return None if shown is None else self._container(shown)

    def _show(self, engine_id: UUID) -> dict[str, Any] | None:
        """All that Docker says of what has the name of the engine's container."""
        try:
            shown: dict[str, Any] = self._api.inspect_container(container_name(engine_id))
        except NotFound:
            return None
        return shown

    def _container(self, shown: dict[str, Any]) -> _Container:
        instance = self._template.instance(shown["Config"]["Labels"], shown["State"]["Status"])
        return _Container(shown["Id"], shown["Image"], instance)

    def _volume_owner(self, engine_id: UUID) -> str | None:
        """Installation of the engine's volume, empty if it has no label; None if there is no volume."""
        try:
            labels = self._api.inspect_volume(volume_name(engine_id))["Labels"]
        except NotFound:
            return None
        return str((labels or {}).get(INSTALLATION_LABEL, ""))

    def _list(self) -> list[Instance]:
        # One call for all: nothing can vanish between a list and a look at each.
        containers = self._api.containers(all=True, filters={"label": f"{INSTALLATION_LABEL}={self._installation}"})
        return [found for one in containers if (found := self._template.instance(one["Labels"], one["State"]))]

    async def free_bytes(self) -> int | None:
        return await free_bytes(self._directories)

    async def list(self) -> list[Instance]:
        return await self._run(self._list)
