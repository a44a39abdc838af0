"""Admits at a steady pace, whatever becomes of them."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.engine.v1 import denial_pb2
from tests.harness import Product, reason

DEADLINE_S = 5.0
"""Of each admit, as its caller says it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call.

    Args:
        began_at: on the monotonic clock.
        took_s: until the answer.
        outcome: `OK`, `admitted`, or the reason of the denial or the error; `DEADLINE_EXCEEDED` if there was none.
    """

    began_at: float
    took_s: float
    outcome: str


async def answered(call: Awaitable[object]) -> Answer:
    """Waits for a call's answer, good or bad."""
    began_at = time.monotonic()
    outcome = "OK"
    try:
        answer = await call
        if isinstance(answer, pb.AdmitResponse):
            outcome = "admitted" if answer.admitted else denial_pb2.Denial.Reason.Name(answer.reason)
    except grpc.aio.AioRpcError as error:
        late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        outcome = "DEADLINE_EXCEEDED" if late else reason(error)
    return Answer(began_at, time.monotonic() - began_at, outcome)


async def admit(
    stub: AdmissionServiceStub,
    product: Product,
    user_id: str,
    *,
    auto_provision: bool = False,
    timeout_s: float = DEADLINE_S,
) -> Answer:
    request = pb.AdmitRequest(user_id=user_id, auto_provision=auto_provision)
    return await answered(stub.Admit(request, metadata=product.metadata, timeout=timeout_s))


@dataclass(frozen=True, slots=True)
class Load:
    """Calls that are made meanwhile."""

    answers: list[Answer]

    def outcomes(self, since: float = 0) -> Counter[str]:
        """How many there were of each outcome, of calls from a moment on."""
        return Counter(answer.outcome for answer in self.answers if answer.began_at >= since)

    async def goes_on(self) -> None:
        """Returns once a call is answered that begins from now on."""
        since = time.monotonic()
        async with asyncio.timeout(2 * DEADLINE_S):
            while not self.outcomes(since):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def p99_s(self, since: float, until: float) -> float:
        """What 99% of the calls of a time took at most."""
        took = sorted(answer.took_s for answer in self.answers if since <= answer.began_at < until)
        return took[len(took) * 99 // 100]


@asynccontextmanager
async def load(
    stubs: Sequence[AdmissionServiceStub], product: Product, user_ids: Sequence[str], per_second: float
) -> AsyncIterator[Load]:
    """Admits users in turn by one stub after the other, at this pace, however long the answers take."""
    answers: list[Answer] = []
    calls: set[asyncio.Task[Answer]] = set()

    def ended(call: asyncio.Task[Answer]) -> None:
        calls.discard(call)
        answers.append(call.result())

    async def run() -> None:
        begun = time.monotonic()
        stub, user_id = itertools.cycle(stubs), itertools.cycle(user_ids)
        for n in itertools.count():
            await asyncio.sleep(begun + n / per_second - time.monotonic())
            call = asyncio.create_task(admit(next(stub), product, next(user_id)))
            calls.add(call)
            call.add_done_callback(ended)

    running = asyncio.create_task(run())
    try:
        yield Load(answers)
    finally:
        running.cancel()
        await asyncio.wait([running, *calls])
