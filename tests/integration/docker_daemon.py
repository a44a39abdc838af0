"""The real Docker daemon, for tests.

Without a daemon the tests are skipped, or fail if `REQUIRE_DOCKER=1` is set.
"""

import gc
import io
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn
from uuid import uuid4

import pytest
from docker import APIClient
from docker.errors import DockerException
from docker.utils import kwargs_from_env

from services.provisioner.backends.engine_template import INSTALLATION_LABEL

_HTTPD = "/bin/busybox httpd -f -p 8000 -h /www"


@dataclass(frozen=True)
class BusyboxImages:
    """Images that answer `GET /health` with `{"status":"ok"}` a few milliseconds after the start.

    They declare a volume of their own, as images may.

    Args:
        engine: ends on SIGTERM.
        deaf: doesn't.
    """

    engine: str
    deaf: str


def remove_all(api: APIClient, installation: str) -> None:
    """Removes what an installation, which must have ended, has in Docker: containers and volumes."""
    filters = {"label": f"{INSTALLATION_LABEL}={installation}"}
    for container in api.containers(all=True, filters=filters):
        api.remove_container(container["Id"], force=True, v=True)
    for volume in api.volumes(filters=filters)["Volumes"] or []:
        api.remove_volume(volume["Name"])


@pytest.fixture(scope="session")
def docker_api() -> Iterator[APIClient]:
    """A client of the tests' own."""
    api = _connect()
    if isinstance(api, str):
        missing(f"no Docker daemon: {api}")
    yield api
    api.close()


def _connect() -> APIClient | str:
    """A client, or why there is none."""
    environment = kwargs_from_env()
    with warnings.catch_warnings():
        # The SDK leaves its socket to the collector when it can't connect.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return APIClient(environment.get("base_url"), tls=environment.get("tls", False), timeout=60)
        except DockerException as exc:
            reason = str(exc)
        gc.collect()
    return reason


@pytest.fixture(scope="session")
def busybox_images(docker_api: APIClient) -> Iterator[BusyboxImages]:
    """Made from the static busybox of this machine, so that nothing is pulled."""
    busybox = shutil.which("busybox")
    if busybox is None:
        missing("no busybox: install the package busybox-static")
    repository = f"september-test-{uuid4().hex}"
    root = _root(busybox)
    # In a container it is process 1, for which only a trap makes SIGTERM do anything.
    commands = {"engine": f"trap 'exit 0' TERM; {_HTTPD} & wait", "deaf": f"{_HTTPD} & wait"}
    for tag, command in commands.items():
        changes = [f"CMD {json.dumps(['/bin/busybox', 'sh', '-c', command])}", "VOLUME /cache"]
        docker_api.import_image_from_data(root, repository=repository, tag=tag, changes=changes)
    yield BusyboxImages(f"{repository}:engine", f"{repository}:deaf")
    for tag in commands:
        docker_api.remove_image(f"{repository}:{tag}", force=True)


def missing(what: str) -> NoReturn:
    """This machine can't run the test."""
    if os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(what)
    pytest.skip(what)


def _root(busybox: str) -> bytes:
    """Root file system: busybox, a page, and a `/data` that belongs to the user of engines."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for name, owner in (("data", 10001), ("tmp", 0), ("www", 0)):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode, directory.uid, directory.gid = tarfile.DIRTYPE, 0o755, owner, owner
            tar.addfile(directory)
        page = b'{"status":"ok"}'
        health = tarfile.TarInfo("www/health")
        health.size, health.mode = len(page), 0o644
        tar.addfile(health, io.BytesIO(page))
    return buffer.getvalue()
