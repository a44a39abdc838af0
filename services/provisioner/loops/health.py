"""Probes engines, and fails those that are no longer well.

Invariant: what a probe says counts once, and only for the run of the engine that was probed, and
within the term of the process that probed it.

The backend has the first word on an engine that does not answer: if its instance has ended, the
engine is failed at once. If many instances run and do not answer, it is the prober that is ill, and
nothing is counted.
"""

import asyncio
import random
import time
from collections.abc import Collection
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend, InstanceState
from services.provisioner.domain.health import Patient, prober_is_ill
from services.provisioner.loops.skipping import skipping
from services.provisioner.metrics import FAILURES, PROBER_ILL, PROBES
from services.provisioner.ports import EngineClient
from services.shared.errors import ServiceError
from services.shared.failpoints import reached

log = structlog.get_logger(__name__)

_CONCURRENCY = 32
# Part of the interval over which the probes of a sweep are spread, and by which its length varies.
_SPREAD = 0.1


class Records(Protocol):
    async def running(self) -> list[Patient]: ...
    async def mark_well(self, engine_ids: Collection[UUID]) -> None: ...
    async def mark_ill(self, patient: Patient, reason: str, *, ended: bool) -> bool: ...


class Health:
    """Args:
    records: where it is written how engines are.
    backend: knows whether an instance runs.
    engines: asks engines how they are.
    interval_s: seconds from one sweep to the next.
    """

    def __init__(
        self,
        records: Records,
        backend: Backend,
        engines: EngineClient,
        *,
        interval_s: float,
    ) -> None:
        self._records = records
        self._backend = backend
        self._engines = engines
        self._interval_s = interval_s

    async def run(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                await self.tick()
            except ServiceError as error:
                log.warning("health_postponed", reason=error.message)
            pause = max(self._interval_s - (time.monotonic() - begun), 0)
            await asyncio.sleep(pause * random.uniform(1 - _SPREAD, 1 + _SPREAD))  # noqa: S311

    async def tick(self) -> None:
        """One sweep over all running engines.

        Raises:
            Unavailable: registry or backend can't be reached; what was not counted, never will be.
        """
        patients = await self._records.running()
        places = asyncio.Semaphore(_CONCURRENCY)
        healthy = await asyncio.gather(*(self._probe(patient, places) for patient in patients))
        answers = list(zip(patients, healthy, strict=True))
        for result, well in (("well", True), ("ill", False), ("unknown", None)):
            PROBES.labels(result).inc(healthy.count(well))
        if any(healthy):
            await self._records.mark_well([patient.engine_id for patient, well in answers if well])
        ill = [patient for patient, well in answers if well is False]
        PROBER_ILL.set(await self._examine(ill, len(patients)) if ill else False)

    async def _probe(self, patient: Patient, places: asyncio.Semaphore) -> bool | None:
        """Whether the engine is healthy; None if that could not be found out."""
        await asyncio.sleep(random.uniform(0, _SPREAD * self._interval_s))  # noqa: S311
        async with places:
            try:
                return (await self._engines.health(patient.url)).healthy
            except Exception:
                log.exception("probe_failed", engine_id=str(patient.engine_id))
                return None

    async def _examine(self, ill: list[Patient], probed: int) -> bool:
        """Counts what their probes say, unless it is rather the prober that is ill; returns whether it is."""
        states = {instance.engine_id: instance.state for instance in await self._backend.list()}
        silent = []
        for patient in ill:
            match states.get(patient.engine_id):
                case InstanceState.RUNNING:
                    silent.append(patient)
                case InstanceState.FROZEN:
                    log.warning("engine_frozen", engine_id=str(patient.engine_id))  # For the reconciler to thaw.
                case _:
                    await self._mark_ill(patient, "its instance had ended", ended=True)
        if prober_is_ill(len(silent), probed):
            log.error("prober_ill", silent=len(silent), probed=probed)
            return True
        for patient in silent:
            reason = f"it has failed {patient.failures + 1} probes in a row"
            await self._mark_ill(patient, reason, ended=False)
        return False

    async def _mark_ill(self, patient: Patient, reason: str, *, ended: bool) -> None:
        with skipping(patient.engine_id):
            failed = await self._records.mark_ill(patient, reason, ended=ended)
            reached("health.marked")
            FAILURES.inc(failed)
            log.warning("engine_ill", engine_id=str(patient.engine_id), reason=reason, failed=failed)
