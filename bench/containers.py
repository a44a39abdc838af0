"""Engines in containers, of which nothing is left in Docker."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from docker import APIClient
from docker.errors import NotFound
from docker.utils import kwargs_from_env

from tests.harness import Platform, running_platform
from tests.integration.docker_daemon import remove_all

IMAGE = "september-engine:dev"


def image_is_here() -> bool:
    """Whether Docker answers and has the image of the reference engine."""
    with suppress(FileNotFoundError):
        command = ["docker", "image", "inspect", IMAGE]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@contextmanager
def docker() -> Iterator[APIClient]:
    api = APIClient(**kwargs_from_env())
    try:
        yield api
    finally:
        api.close()


@contextmanager
def docker_platform(database_url: str, directory: Path, **settings: str) -> Iterator[tuple[Platform, APIClient]]:
    """A platform whose engines are containers, of which nothing is left in Docker at the end."""
    directory.mkdir()
    network = f"engine_bench_{uuid4().hex[:8]}"
    settings |= {"ORCH_ENGINE_BACKEND": "docker", "ORCH_ENGINE_IMAGE": IMAGE, "ORCH_ENGINE_NETWORK": network}
    with docker() as api, running_platform(database_url, directory, **settings) as platform:
        try:
            yield platform, api
        finally:
            # Or it would make anew what is removed.
            platform.close()
            remove_all(api, platform.installation())
            with suppress(NotFound):
                api.remove_network(network)
