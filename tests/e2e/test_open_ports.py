"""What an installation listens on: what is documented, for this host alone, and nothing else."""

from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from services.cli.gateway import Lane
from tests.e2e.installation import Installation, install

__all__ = ["install"]


def listening(installation: Installation) -> set[tuple[str, int]]:
    """Address and port of every socket on which a process of the installation waits for others."""
    found: set[tuple[str, int]] = set()
    for process in installation.processes():
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and not connection.raddr:
                    found.add((connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port))
    return found


@pytest.mark.parametrize("lane", Lane)
def test_an_installation_listens_on_what_is_documented_and_on_loopback_alone(
    install: Callable[..., Installation], lane: Lane
) -> None:
    installation = install(ORCH_WARM_POOL_SIZE="1")
    installation.up("--lane", lane)
    engine = installation.admit()
    shell = installation.announced()
    urls = [shell[name] for name in ("REST_URL", "ADMIN_URL", "ADMISSION_ADDR", "PROVISIONER_ADDR")]
    urls += [engine["url"], (installation.var / "run" / "gateway.admin").read_text()]
    documented = {int(url.rpartition(":")[2]) for url in urls}
    found = listening(installation)
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    open_ports = {port for _, port in found}
    assert documented <= open_ports
    # Engines of the warm pool have no users yet.
    assert open_ports - documented <= set(range(24000, 25000))
