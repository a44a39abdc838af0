"""`september up --backend docker`, with real containers."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from docker import APIClient

from services.cli.gateway import Lane
from services.cli.rest import Listener
from services.provisioner.backends.engine_template import INSTALLATION_LABEL
from tests.e2e.installation import Installation, install, post
from tests.harness import DEADLINE_S, ROOT
from tests.integration.docker_daemon import docker_api, remove_all

__all__ = ["docker_api", "install"]

Install = Callable[..., Installation]


@pytest.fixture
def network(docker_api: APIClient) -> Iterator[str]:
    """The name of a network for the test's engines, with the image to make them of."""
    subprocess.run([ROOT / "deploy" / "docker" / "make-engine-image"], check=True, capture_output=True)
    name = f"september-test-{uuid4().hex}"
    yield name
    # Members of the warm pool stay, as all engines do, for the next start.
    for container in docker_api.containers(all=True, filters={"network": name}):
        remove_all(docker_api, container["Labels"][INSTALLATION_LABEL])
    for network in docker_api.networks(names=[name]):
        docker_api.remove_network(network["Id"])


def destroy(installation: Installation, user_id: str) -> None:
    shell = installation.announced()
    gateway = shell["REST_URL"].removeprefix("http://")
    assert Listener(gateway).call("DELETE", f"/engines/{user_id}", {"X-Platform-Key": shell["PLATFORM_KEY"]})[0] == 200


def clients_of_docker() -> set[str]:
    """Links to the sockets at which somebody is connected to Docker, as `/proc` has them."""
    connections = subprocess.run(["ss", "-xH"], check=True, capture_output=True, text=True).stdout
    # The path is that of Docker's end; behind its inode is the other's.
    ends = [line.split() for line in connections.splitlines() if "/docker.sock " in line]
    return {f"socket:[{end[-1]}]" for end in ends}


def links(process: psutil.Process) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(descriptor))
    return found


@pytest.mark.skipif(shutil.which("ss") is None, reason="the package iproute2 is missing")
@pytest.mark.parametrize("lane", Lane)
def test_the_provisioner_alone_is_connected_to_docker(network: str, install: Install, lane: Lane) -> None:
    installation = install(ORCH_ENGINE_NETWORK=network)
    installation.up("--backend", "docker", "--lane", lane)
    installation.admit()
    docker = clients_of_docker()
    holders = [process for process in installation.processes() if links(process) & docker]
    assert holders
    assert all("services.provisioner" in process.cmdline() for process in holders), holders
    assert {"provisioner", "envoy"} <= installation.names()
    destroy(installation, "ada")


def test_each_backend_has_users_engines_of_its_own(docker_api: APIClient, network: str, install: Install) -> None:
    installation = install(ORCH_ENGINE_NETWORK=network)
    up = installation.up()
    process = installation.admit()
    up.terminate()
    assert up.wait(DEADLINE_S) == 0

    up = installation.up("--backend", "docker")
    container = installation.admit()
    name = f"engine-{container['engine_id']}"
    answer = post(
        f"{container['url']}/execute",
        {"conversation_id": "c1", "message": "hello"},
        X_Engine_Key=container["api_key"],
    )
    assert answer[0] == 200
    up.terminate()
    assert up.wait(DEADLINE_S) == 0
    assert docker_api.inspect_container(name)["State"]["Status"] == "exited"

    up = installation.up("--backend", "docker")
    assert installation.admit()["engine_id"] == container["engine_id"]
    destroy(installation, "ada")
    up.terminate()
    assert up.wait(DEADLINE_S) == 0
    assert docker_api.containers(all=True, filters={"name": name}) == []

    installation.up()
    assert installation.admit()["engine_id"] == process["engine_id"]
