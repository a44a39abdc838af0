"""Takes up operations and carries them out, as many side by side as there are places in each queue.

Invariant: this process acts on an operation only while it holds its lease. Leases are renewed
several times within their length; one that can't be renewed runs out here before it runs out in
the registry, because it is counted from before the request.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.domain.operation import (
    PATIENCE_S,
    LeaseLost,
    Operation,
    OperationKind,
    Outcome,
    Queue,
    Settled,
)
from services.provisioner.execution import Executor
from services.provisioner.lease import Lease
from services.provisioner.metrics import LEASE_LOST, OPERATION_SECONDS, OPERATIONS, POSTPONED, QUARANTINED
from services.shared.errors import Unavailable
from services.shared.failpoints import reached
from services.shared.loops import Pulse
from services.shared.tracing import continued

log = structlog.get_logger(__name__)

# Failures that nobody foresaw, until the operation is taken out of the way.
_MAX_ATTEMPTS = 5
_LONGEST_PAUSE_S = 30.0


# Those that start no instance. They mostly wait for others, and Docker's threads are bounded by themselves.
_PLACES = {Queue.SLEEP: 16, Queue.OTHER: 32}


class Operations(Protocol):
    """Operations that wait for a worker."""

    async def claim(self, places: Mapping[Queue, int], running: Collection[UUID]) -> list[Operation]: ...
    async def renew(self, operation_ids: Collection[UUID]) -> dict[UUID, bool]: ...
    async def release(self, operation: Operation, pause_s: float) -> None: ...
    async def quarantine(self, operation: Operation) -> None: ...


@dataclass(slots=True)
class _Run:
    operation: Operation
    lease: Lease
    task: asyncio.Task[None]


def _may_be_left(operation: Operation) -> bool:
    """Whether enough was tried; a destroy is tried until it is done, since nothing else can end it."""
    return operation.attempts >= _MAX_ATTEMPTS and operation.kind is not OperationKind.DESTROY


def _pause_s(operation: Operation) -> float:
    """Until it is tried again."""
    return min(0.25 * 2.0 ** min(operation.attempts, 10), _LONGEST_PAUSE_S)


class OperationWorker:
    """Args:
    operations: where they are claimed.
    executor: carries them out.
    boot_concurrency: most operations at once that start an instance.
    lease_s: length of a claim, in seconds, as the queue grants it.
    settled: told of every operation that ends here.
    delayed: told of those that are not tried again for long, and why.
    """

    def __init__(
        self,
        operations: Operations,
        executor: Executor,
        *,
        boot_concurrency: int,
        lease_s: float,
        settled: Callable[[Settled], None],
        delayed: Callable[[UUID, Unavailable], None],
    ) -> None:
        self._operations = operations
        self._executor = executor
        self._places = {Queue.BOOT: boot_concurrency, **_PLACES}
        self._lease_s = lease_s
        self._settled = settled
        self._delayed = delayed
        self._runs: dict[UUID, _Run] = {}
        # Queues in which some may wait that no place was free for.
        self._crowded = set(Queue)
        self._pulse = Pulse()

    def wake(self) -> None:
        """Something was queued, or has to give way: look now and not at the next poll."""
        self._pulse.give()

    async def run(self) -> None:
        """Works until cancelled, then hands over what it could not finish within moments."""
        try:
            while True:
                try:
                    await self.tick()
                except Unavailable:
                    log.warning("operations_unreachable", running=len(self._runs))
                await self._pulse.wait(self._lease_s / 5)
        finally:
            await self._hand_over()

    async def tick(self) -> None:
        """Renews the leases of what runs here and claims as much as there are places for."""
        now = time.monotonic()
        if self._runs:
            held = await self._operations.renew(self._runs)
            for operation_id, give_way in held.items():
                if operation_id in self._runs:
                    self._runs[operation_id].lease.renew(now + self._lease_s, give_way=give_way)
        # Until the claim says otherwise: a place may become free while it is under way.
        self._crowded = set(Queue)
        taken = Counter(run.operation.queue for run in self._runs.values())
        free = {queue: places - taken[queue] for queue, places in self._places.items() if places > taken[queue]}
        if not free:
            return
        now = time.monotonic()
        claimed = await self._operations.claim(free, self._runs)
        if claimed:
            reached("operation.claimed")
        found = Counter(operation.queue for operation in claimed)
        self._crowded = {queue for queue in Queue if found[queue] == free.get(queue, 0)}
        for operation in claimed:
            lease = Lease(now + self._lease_s, give_way=operation.cancelled)
            task = asyncio.create_task(self._carry_out(operation, lease), name=f"operation {operation.kind}")
            self._runs[operation.operation_id] = _Run(operation, lease, task)

    async def _carry_out(self, operation: Operation, lease: Lease) -> None:
        ids = {"operation_id": str(operation.operation_id), "engine_id": str(operation.engine_id)}
        if operation.request_id is not None:
            ids["request_id"] = operation.request_id
        with (
            structlog.contextvars.bound_contextvars(kind=operation.kind, **ids),
            continued(f"operation {operation.kind}", operation.traceparent, **ids),
        ):
            begun = time.monotonic()
            try:
                settled = await self._executor.execute(operation, lease)
                reached("operation.finished")
            except LeaseLost:
                OPERATIONS.labels(operation.kind, LEASE_LOST).inc()
                log.warning("lease_lost")
                with suppress(LeaseLost, Unavailable):
                    await self._operations.release(operation, pause_s=0)
            except Unavailable as error:
                log.warning("operation_postponed", reason=error.message)
                if _pause_s(operation) >= PATIENCE_S:
                    self._delayed(operation.operation_id, error)
                await self._postpone(operation)
            except Exception:
                log.exception("operation_failed", attempts=operation.attempts)
                await self._postpone(operation, last=_may_be_left(operation))
            else:
                OPERATIONS.labels(operation.kind, settled.outcome).inc()
                if settled.outcome is Outcome.SUCCEEDED:
                    OPERATION_SECONDS.labels(operation.kind).observe(time.monotonic() - begun)
                log.info("operation_finished", outcome=settled.outcome, error_code=settled.error_code)
                self._settled(settled)
            finally:
                self._runs.pop(operation.operation_id, None)
                if operation.queue in self._crowded:
                    self._pulse.give()

    async def _postpone(self, operation: Operation, *, last: bool = False) -> None:
        OPERATIONS.labels(operation.kind, QUARANTINED if last else POSTPONED).inc()
        # If this fails too, the lease runs out and the operation is taken up again.
        with suppress(LeaseLost, Unavailable):
            if last:
                await self._operations.quarantine(operation)
            else:
                await self._operations.release(operation, _pause_s(operation))

    async def _hand_over(self) -> None:
        """Stops every operation at its next safe point and gives it back."""
        for run in self._runs.values():
            run.lease.revoke()
        tasks = [run.task for run in self._runs.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._lease_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
