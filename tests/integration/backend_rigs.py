"""What a test needs to look at a backend from outside, for each kind of backend."""

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from uuid import UUID, uuid4

import psutil
import pytest
from docker import APIClient
from docker.errors import NotFound

from services.provisioner.backends.base import Backend, EngineSpec
from services.provisioner.backends.docker import DockerBackend
from services.provisioner.backends.process import ProcessBackend
from tests.integration.docker_daemon import BusyboxImages

DEADLINE_S = 20.0


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Returns when `condition` holds; fails when it doesn't in time."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.01)


def free_port() -> int:
    """A port above those of the tests' engines, and below those of outgoing connections: none of them takes it."""
    while True:
        port = 29000 + secrets.randbelow(3000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Rig(Protocol):
    """A kind of backend with an installation of the test's own."""

    engine: str
    """Image that listens, and ends on SIGTERM."""
    deaf: str
    """Image that listens, and ignores SIGTERM."""
    missing: str
    """Name of an image that is refused."""

    async def backend(self, installation: str | None = None) -> Backend:
        """One more backend, opened; of the same installation unless another is given."""
        ...

    def freeze(self, engine_id: UUID) -> None: ...

    def incarnation(self, engine_id: UUID) -> str:
        """Tells one life of the engine from the next."""
        ...

    def running(self, engine_id: UUID) -> int:
        """How many engines of this id run."""
        ...

    def volume(self, engine_id: UUID) -> Path | None: ...

    def leftovers(self) -> int:
        """Instances and volumes of the installation."""
        ...


def spec_for(rig: Rig, **fields: object) -> EngineSpec:
    spec = EngineSpec(
        engine_id=uuid4(), generation=1, image=rig.engine, port=free_port(), environment={"ENGINE_KEY_HASH": "0" * 64}
    )
    return replace(spec, **fields)  # type: ignore[arg-type]


async def answers(port: int) -> bool:
    """Whether the engine itself is there: Docker's proxy listens before it."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        return await reader.read(1) != b""
    except OSError:
        return False
    finally:
        writer.close()


class ProcessRig:
    engine = "tests.engines.never_healthy"
    deaf = "tests.engines.deaf"
    missing = "-c import os"

    def __init__(self, data_dir: Path) -> None:
        self.installation = uuid4().hex
        self.data_dir = data_dir
        self._backends: list[Backend] = []

    async def backend(self, installation: str | None = None, **options: object) -> Backend:
        backend = ProcessBackend(installation or self.installation, self.data_dir, **options)  # type: ignore[arg-type]
        await backend.open()
        self._backends.append(backend)
        return backend

    def processes(self, engine_id: UUID | None = None, *, leaders: bool = True) -> list[psutil.Process]:
        """Found by the labels, without the code under test."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                environment = process.environ()
                if (
                    environment.get("SEPTEMBER_INSTALLATION") == self.installation
                    and engine_id in (None, UUID(environment["SEPTEMBER_ENGINE_ID"]))
                    and (not leaders or os.getsid(process.pid) == process.pid)
                ):
                    found.append(process)
        return found

    def freeze(self, engine_id: UUID) -> None:
        (process,) = self.processes(engine_id)
        os.killpg(process.pid, signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            pass

    def incarnation(self, engine_id: UUID) -> str:
        (process,) = self.processes(engine_id)
        return f"{process.pid} {process.create_time()}"

    def running(self, engine_id: UUID) -> int:
        return len(self.processes(engine_id))

    def volume(self, engine_id: UUID) -> Path | None:
        volume = self.data_dir / str(engine_id) / "data"
        return volume if volume.exists() else None

    def leftovers(self) -> int:
        return len(self.processes(leaders=False)) + len(list(self.data_dir.iterdir()))

    async def clean(self) -> None:
        for process in self.processes(leaders=False):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for backend in self._backends:
            await backend.close()


class DockerRig:
    missing = "september-test/none:1"

    def __init__(self, api: APIClient, images: BusyboxImages) -> None:
        self.installation = uuid4().hex
        self.network = f"engine-test-{self.installation}"
        self.engine = images.engine
        self.deaf = images.deaf
        self.api = api
        self._filters = {"label": f"september.installation={self.installation}"}
        self._backends: list[Backend] = []

    async def backend(self, installation: str | None = None, **options: object) -> Backend:
        backend = DockerBackend(installation or self.installation, self.network, **options)  # type: ignore[arg-type]
        await backend.open()
        self._backends.append(backend)
        return backend

    def freeze(self, engine_id: UUID) -> None:
        self.api.pause(f"engine-{engine_id}")

    def incarnation(self, engine_id: UUID) -> str:
        container = self.api.inspect_container(f"engine-{engine_id}")
        return f"{container['Id']} {container['State']['StartedAt']}"

    def running(self, engine_id: UUID) -> int:
        found = self.api.containers(filters={"label": f"september.engine_id={engine_id}"})
        return len(found)

    def volume(self, engine_id: UUID) -> Path | None:
        try:
            return Path(self.api.inspect_volume(f"engine-data-{engine_id}")["Mountpoint"])
        except NotFound:
            return None

    def leftovers(self) -> int:
        containers = self.api.containers(all=True, filters=self._filters)
        return len(containers) + len(self.api.volumes(filters=self._filters)["Volumes"] or [])

    async def clean(self) -> None:
        for backend in self._backends:
            await backend.close()
        for container in self.api.containers(all=True, filters=self._filters):
            self.api.remove_container(container["Id"], force=True, v=True)
        for volume in self.api.volumes(filters=self._filters)["Volumes"] or []:
            self.api.remove_volume(volume["Name"])
        for network in self.api.networks(names=[self.network]):
            self.api.remove_network(network["Id"])


@pytest.fixture
async def process_rig(tmp_path: Path) -> AsyncIterator[ProcessRig]:
    rig = ProcessRig(tmp_path / "engines")
    yield rig
    await rig.clean()


@pytest.fixture
async def docker_rig(docker_api: APIClient, busybox_images: BusyboxImages) -> AsyncIterator[DockerRig]:
    rig = DockerRig(docker_api, busybox_images)
    yield rig
    await rig.clean()


@pytest.fixture(params=["process", "docker"])
def rig(request: pytest.FixtureRequest) -> Rig:
    found: Rig = request.getfixturevalue(f"{request.param}_rig")
    return found
