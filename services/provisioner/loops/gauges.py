"""Reads from the registry what Prometheus is told of it.

Invariant: it changes nothing, so every Provisioner does it by itself. While the registry can't be
reached its numbers stay as they were, and their age says so.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

import structlog

from services.provisioner import metrics
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.operation import Queue
from services.shared.errors import Unavailable
from services.shared.metrics import REGISTRY_AGE

log = structlog.get_logger(__name__)

_PERIOD_S = 5.0


class Numbers(Protocol):
    async def read(self) -> Mapping[tuple[str, str | None], float]: ...


class Gauges:
    """Args:
    numbers: read from the registry.
    ports: how many ports this node has.
    """

    def __init__(self, numbers: Numbers, *, ports: int) -> None:
        self._numbers = numbers
        self._ports = ports

    async def run(self) -> None:
        read_at = time.monotonic()
        REGISTRY_AGE.set_function(lambda: time.monotonic() - read_at)
        while True:
            try:
                begun = time.monotonic()
                await self.tick()
                read_at = begun
            except Unavailable:
                log.warning("gauges_not_read")
            await asyncio.sleep(_PERIOD_S)

    async def tick(self) -> None:
        """Reads all once.

        Raises:
            Unavailable: the registry can't be reached.
        """
        numbers = await self._numbers.read()

        def number(gauge: str, label: str | None = None) -> float:
            return numbers.get((gauge, label), 0)

        for queue in Queue:
            metrics.OPEN.labels(queue).set(number("open", queue))
        metrics.OLDEST.set(number("oldest"))
        metrics.QUARANTINE.set(number("quarantined"))
        for status in EngineStatus:
            metrics.ENGINES.labels(status).set(number("engines", status))
        for state in ("ready", "booting"):
            metrics.POOL_MEMBERS.labels(state).set(number("pool", state))
        leased, set_aside = number("ports", "leased"), number("ports", "set_aside")
        metrics.PORTS.labels("leased").set(leased)
        metrics.PORTS.labels("set_aside").set(set_aside)
        metrics.PORTS.labels("free").set(self._ports - leased - set_aside)
