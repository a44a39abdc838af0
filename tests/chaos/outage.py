"""A platform in an outage: who is admitted all the same, who is told, and when all works again."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.chaos.load import Answer, Load, admit, answered, load
from tests.harness import Clients, Platform, Product

USERS = ("u0", "u1")
# One whose engine is changed, and so not admitted to from memory.
CHANGED = "changed"
RECOVERY_S = 5.0
# Far below every deadline of a call, and far above what it takes on a crowded machine.
AT_ONCE_S = 5.0
# That of the gateway, for calls that boot nothing.
ANSWERED_S = 15.0


@asynccontextmanager
async def during(trouble: AbstractContextManager[None]) -> AsyncIterator[None]:
    """Has something that takes a while about the block, and calls go on meanwhile."""
    await asyncio.to_thread(trouble.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(trouble.__exit__, None, None, None)


@dataclass(frozen=True)
class Callers:
    """Those who call for a product, some of whose users have running engines.

    Args:
        stubs: of every Admission that they call.
    """

    platform: Platform
    clients: Clients
    product: Product
    stubs: Sequence[AdmissionServiceStub]

    async def open(self) -> None:
        """Makes the engines that are not there, which all replicas know from then on."""
        await asyncio.gather(*(self._admitted(self.stubs[0], user_id) for user_id in (*USERS, CHANGED)))
        await asyncio.to_thread(self.platform.replicas_know)
        for stub in self.stubs:
            for user_id in USERS:
                await self._admitted(stub, user_id)

    async def _admitted(self, stub: AdmissionServiceStub, user_id: str) -> None:
        answer = await admit(stub, self.product, user_id, auto_provision=True, timeout_s=60)
        assert answer.outcome == "admitted"

    def load(self, per_second: float, *user_ids: str) -> AbstractAsyncContextManager[Load]:
        """Admits these users, or those with running engines."""
        return load(self.stubs, self.product, user_ids or USERS, per_second)

    async def ask(self) -> dict[str, Answer]:
        """Calls at once for what memory can't answer: by `admit` and the number of the stub, or by the method."""
        nobody = f"new-{time.monotonic()}"
        provisioner = self.clients.provisioner
        said: dict[str, Any] = {"metadata": self.product.metadata, "timeout": ANSWERED_S}
        calls: dict[str, Awaitable[Answer]] = {
            "provision": answered(
                provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id=f"{nobody}-p"), **said)
            ),
            "rotate": answered(provisioner.RotateEngineKey(pb.RotateEngineKeyRequest(user_id=CHANGED), **said)),
        }
        for n, stub in enumerate(self.stubs):
            calls[f"admit {n}"] = admit(stub, self.product, nobody, auto_provision=True, timeout_s=ANSWERED_S)
        return dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))

    async def told(self) -> None:
        """Returns once the platform was too ill for a change, and whoever asked was told so in time."""
        async with asyncio.timeout(4 * ANSWERED_S):
            while True:
                outcomes = {answer.outcome for answer in (await self.ask()).values()}
                assert outcomes <= {"OK", "admitted", "UNAVAILABLE"}
                if "UNAVAILABLE" in outcomes:
                    return

    async def recovery_s(self) -> float:
        """Seconds until all works again: a new user gets an engine, and replicas have flushed."""
        begun = time.monotonic()
        async with asyncio.timeout(6 * RECOVERY_S):
            user_id = f"new-{begun}"
            while (await admit(self.stubs[0], self.product, user_id, auto_provision=True)).outcome != "admitted":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await asyncio.to_thread(self.platform.replicas_know)
        return time.monotonic() - begun
