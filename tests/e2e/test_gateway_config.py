"""The rendered configuration and the process that runs it."""

import asyncio
import re
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from google.api import annotations_pb2  # type: ignore[import-untyped]

from services.cli.gateway import GatewaySettings, command, render
from tests.e2e.gateway_calls import CHANGES, METHODS, SERVICES
from tests.e2e.gateway_process import DEADLINE_S, eventually, running_gateway
from tests.e2e.gateway_services import running_services

SETTINGS = GatewaySettings("127.0.0.1:8080", "admission:50051", "[::1]:50052", admin_port=9901, boot_timeout_s=12.5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_envoy_accepts_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "envoy.yaml"
    config.write_text(render(SETTINGS))
    validation = subprocess.run(
        [*command(config), "--mode", "validate"], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert validation.returncode == 0, validation.stderr
    assert validation.stderr == ""


def routes() -> dict[str, tuple[str, float]]:
    """Cluster and timeout in seconds of every method's route."""
    found = re.findall(r"\{name: (\w+), match: .* route: \{cluster: (\w+), timeout: ([\d.]+)s", render(SETTINGS))
    return {name: (cluster, float(timeout_s)) for name, cluster, timeout_s in found}


def test_every_method_with_a_rest_path_has_a_route_and_no_other() -> None:
    public = {
        method.name
        for service in SERVICES
        for method in service.methods
        if method.GetOptions().HasExtension(annotations_pb2.http)
    }
    assert set(routes()) == set(METHODS) == public
    assert "EnsureEngine" not in public


def test_a_method_goes_to_its_own_service() -> None:
    clusters = {name: cluster for name, (cluster, _) in routes().items()}
    assert clusters == {name: "admission" if m.is_admission else "provisioner" for name, m in METHODS.items()}


def test_calls_that_change_engines_outlast_a_stop_a_boot_and_an_undo() -> None:
    timeouts = {name: timeout_s for name, (_, timeout_s) in routes().items()}
    assert timeouts == {**dict.fromkeys(METHODS, 15), **dict.fromkeys(CHANGES, 72.5), "WatchEngine": 0}
    idle = re.search(r"stream_idle_timeout: (\S+)s", render(SETTINGS))
    assert idle is not None
    assert float(idle[1]) > max(timeouts.values())


async def test_the_admin_interface_is_on_loopback_alone(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1") as gateway:
        assert gateway.admin.startswith("127.0.0.1:")


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        render(GatewaySettings(address, "a:1", "b:2"))


async def test_a_second_gateway_on_the_port_fails(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, "127.0.0.1:1", "127.0.0.1:1") as gateway:
        config = tmp_path / "second.yaml"
        config.write_text(render(GatewaySettings(gateway.address, "127.0.0.1:1", "127.0.0.1:1")))
        second = await asyncio.create_subprocess_exec(*command(config), stderr=asyncio.subprocess.PIPE)
        try:
            _, log = await asyncio.wait_for(second.communicate(), DEADLINE_S)
        finally:
            with suppress(ProcessLookupError):
                second.kill()
        assert second.returncode != 0
        assert b"Address already in use" in log


async def test_services_may_be_named_by_host(tmp_path: Path) -> None:
    async with running_services() as services:
        address = services.address.replace("127.0.0.1", "localhost")
        async with running_gateway(tmp_path, address, address) as gateway:
            assert (await gateway.rest("GET", "/health")).json() == {"status": "ok"}


async def test_services_that_start_later_are_found(tmp_path: Path) -> None:
    port = free_port()
    async with running_gateway(tmp_path, f"127.0.0.1:{port}", f"127.0.0.1:{port}") as gateway:
        assert (await gateway.rest("GET", "/health")).own_error()[:2] == (503, "UNAVAILABLE")
        async with running_services(port):
            assert (await gateway.rest("GET", "/health")).json() == {"status": "ok"}


async def test_calls_go_to_the_one_replica_of_three_that_is_well(tmp_path: Path) -> None:
    async with running_services(healthy=True) as well, running_services() as ill, running_services() as ending:
        addresses = ",".join(services.address for services in (well, ill, ending))
        async with running_gateway(tmp_path, addresses, addresses) as gateway:

            async def known() -> bool:
                statistics = await gateway.admin_page("/stats?filter=membership_healthy")
                return statistics.count(b"membership_healthy: 1\n") == 2

            await eventually(known)
            for path in ("/health", "/products") * 9:
                assert (await gateway.rest("GET", path)).status == 200
        assert sum(map(len, well.calls.values())) == 18
        assert not ill.calls
        assert not ending.calls
