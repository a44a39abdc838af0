"""Serves what this process tells Prometheus, on an address of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from prometheus_client import start_http_server

from services.shared.grpc_server import AddressTaken
from services.shared.metrics import LOOP_LAG
from services.shared.service import background

log = structlog.get_logger(__name__)

_LOOK_S = 0.25


@asynccontextmanager
async def serving_metrics(address: str | None) -> AsyncIterator[None]:
    """Serves `/metrics` from entry to exit, in a thread: a busy event loop can still be asked how it is.

    Anyone who reaches the address may read it, so it is to be reached by few.

    Args:
        address: `host:port`; port 0 takes a free one, which is logged. None to serve nothing.

    Raises:
        AddressTaken: another process has it, or it is not this host's.
    """
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"))
    except OSError as error:
        raise AddressTaken(address) from error
    log.info("metrics_serving", port=server.server_port)
    try:
        async with background(_measure_lag()):
            yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


async def _measure_lag() -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        LOOP_LAG.observe(max(loop.time() - due, 0))
