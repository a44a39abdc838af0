"""Servers as real processes: Envoy, the gateway, and the peers."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.installation import Installation
from services.cli import gateway
from services.cli.addresses import claim
from services.cli.gateway import Lane
from services.cli.health import answering
from services.cli.rest import Listener
from tests.harness import ROOT

_START_S = 30.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Server:
    """Args:
    address: `host:port` that it listens on.
    processes: all that take part in an answer, but PostgreSQL.
    """

    address: str
    processes: Sequence[psutil.Process]

    def processor_s(self) -> float:
        """Seconds that they have computed so far."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self.processes))


def free_address() -> str:
    return claim({"": "127.0.0.1:0"})[""]


@contextmanager
def process(
    command: Sequence[str],
    address: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path = ROOT,
) -> Iterator[psutil.Process]:
    """Runs a server; inside, it listens on `address`.

    Args:
        environment: over that of this process.
        directory: in which it runs.

    Raises:
        RuntimeError: it does not.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen' / 'python'}", **(environment or {})}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        _await_listener(server, address, log)
        yield psutil.Process(server.pid)
    finally:
        with suppress(psutil.NoSuchProcess):
            begun = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            # One that was killed has not ended what it began.
            for child in begun:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def _await_listener(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server.args!r} does not serve: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)


@contextmanager
def envoy(
    name: str, config: str, address: str, directory: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Runs Envoy with as many threads and the same logs as the gateway has."""
    file = directory / f"{name}.yaml"
    file.write_text(config)
    with process(gateway.command(file), address, directory / f"{name}.log", environment) as server:
        yield Server(address, (server,))


@contextmanager
def started_gateway(subject: Installation, lane: Lane, directory: Path) -> Iterator[Server]:
    """The gateway of an installation, in the fast lane with an Admission of its own inside."""
    address = free_address()
    admission = None if lane is Lane.FAST else subject.admission.address
    config = gateway.render(gateway.GatewaySettings(address, admission, subject.provisioner.address))
    environment = dict(gateway.lane_environment() or {}) if lane is Lane.FAST else {}
    environment |= subject.platform.environment | {"ORCH_PROVISIONER_ADDR": subject.provisioner.address}
    with envoy(f"{lane}-gateway", config, address, directory, environment) as server:
        asyncio.run(asyncio.wait_for(answering(Listener(address)), _START_S))
        behind = () if lane is Lane.FAST else (psutil.Process(subject.admission.process.pid),)
        yield Server(address, (*server.processes, *behind))


@contextmanager
def peer(name: str, directory: Path, *arguments: str) -> Iterator[Server]:
    """Runs `bench.peers.<name>`."""
    address = free_address()
    command = [sys.executable, "-m", f"bench.peers.{name}", address, *arguments]
    with process(command, address, directory / f"{name}.log") as server:
        yield Server(address, (server,))
