"""Several processes that serve one port side by side, each a replica of its own.

They are started fresh, never forked: gRPC does not survive a fork. The port is shared on purpose
(SO_REUSEPORT), so it is made sure first that nobody else has it. A worker that dies is replaced.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import structlog

from services.admission.settings import AdmissionSettings
from services.shared import children
from services.shared.errors import Unavailable
from services.shared.grpc_server import AddressTaken
from services.shared.service import background

log = structlog.get_logger(__name__)

WORKER = "worker"
"""The argument that makes a process one of several."""

# Beside the time to drain: more than a worker gives its calls.
_GRACE_S = 30.0
_PAUSE_S = 0.5


@asynccontextmanager
async def serve_by_workers(settings: AdmissionSettings) -> AsyncIterator[int]:
    """Serves by `settings.admission_workers` processes from entry to exit; gives the port, once all serve.

    Raises:
        AddressTaken: another process has the address, or it is not this host's.
        Unavailable: a worker ended before it served, and has logged why.
    """
    with _reserved(settings.admission_listen) as port:
        host = settings.admission_listen.rpartition(":")[0]
        workers = [
            _Worker(f"{host}:{port}", nth_address(settings.admission_metrics_listen, n), settings.drain_s)
            for n in range(settings.admission_workers)
        ]
        try:
            await asyncio.gather(*(worker.start() for worker in workers))
            async with background(_keep_running(workers)):
                log.info("serving", port=port, workers=len(workers))
                yield port
        finally:
            await asyncio.gather(*(worker.stop() for worker in workers))


@contextmanager
def _reserved(address: str) -> Iterator[int]:
    """Holds a port without listening on it, so that no stranger gets it while no worker listens."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = (host.strip("[]"), int(port))
    with socket.socket(family) as probe, socket.socket(family) as holder:
        try:
            # Without sharing: who has the port already would get a part of the calls.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
            probe.close()
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(where)
        except OSError as error:
            raise AddressTaken(address) from error
        yield int(holder.getsockname()[1])


def nth_address(address: str | None, n: int) -> str | None:
    """The address, `n` ports further on; with port 0, by which each takes a free one, as it is."""
    if address is None or address.endswith(":0"):
        return address
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + n}"


class _Worker:
    """One worker after another.

    Args:
        address: what they serve on, side by side with others.
        metrics: what they serve their metrics on, of all workers this one alone; None for no metrics.
        drain_s: how long one serves on when it is told to end, in seconds.
    """

    def __init__(self, address: str, metrics: str | None, drain_s: float) -> None:
        self._environment = {**os.environ, "ORCH_ADMISSION_LISTEN": address}
        if metrics is not None:
            self._environment["ORCH_ADMISSION_METRICS_LISTEN"] = metrics
        self._grace_s = drain_s + _GRACE_S
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts one; returns once it serves.

        Raises:
            Unavailable: it ended instead.
        """
        command = (sys.executable, "-m", "services.admission", WORKER)
        # It says one line, when it serves.
        self._process = await children.start(*command, environment=self._environment, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            raise Unavailable("a worker ended before it served")

    async def run(self) -> None:
        """Replaces every worker that ends, until cancelled."""
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.error("worker_ended", code=code)
            with suppress(Unavailable):
                await self.start()
                continue
            # What keeps it from serving may pass, as the registry's outage does.
            await asyncio.sleep(_PAUSE_S)

    async def stop(self) -> None:
        if self._process is not None:
            await children.stop(self._process, self._grace_s)


async def _keep_running(workers: list[_Worker]) -> None:
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run())
