"""Callers as a rolling restart finds them: they follow what connections tell them, and repeat no call that failed."""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.provisioner.v1 import provisioner_service_pb2 as pb
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub
from tests.harness import Product

# Of each call: far more than any takes here.
_DEADLINE_S = 30.0
# How long a gateway that has closed a connection by its own will is left alone while there is another.
_SHUN_S = 10.0
# Or the callers would take the processor that the parts need to start.
_BETWEEN_ADMITS_S, _BETWEEN_LIVES_S = 0.02, 0.5
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


class Callers:
    """A product's callers, of REST and of gRPC.

    Args:
        gateways: addresses, of which any serves.
        product: theirs.
    """

    def __init__(self, gateways: Sequence[str], product: Product, session: aiohttp.ClientSession) -> None:
        self.calls: Counter[str] = Counter()
        self.failures: list[str] = []
        self._product = product
        self._session = session
        self._shunned = dict.fromkeys(gateways, 0.0)
        self._channel = grpc.aio.insecure_channel(
            f"ipv4:{','.join(gateways)}",
            options=[("grpc.service_config", _ROUND_ROBIN), ("grpc.max_reconnect_backoff_ms", 1000)],
        )
        self._admission = AdmissionServiceStub(self._channel)
        self._provisioner = ProvisionerServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def rest(self, verb: str, path: str, body: Any = None) -> None:
        """A call; another gateway is tried if a connection could not be made."""
        for gateway in sorted(self._shunned, key=self._shunned.__getitem__):
            try:
                async with self._session.request(
                    verb,
                    f"http://{gateway}/engines{path}",
                    json=body,
                    headers={"x-platform-key": self._product.key},
                    timeout=aiohttp.ClientTimeout(_DEADLINE_S),
                ) as answer:
                    text = await answer.text()
                    if answer.headers.get("connection") == "close":
                        self._shunned[gateway] = time.monotonic() + _SHUN_S
                    if answer.status != 200:
                        raise RuntimeError(f"{answer.status} {text}")
                    return
            except aiohttp.ClientConnectorError:
                self._shunned[gateway] = time.monotonic() + _SHUN_S
        raise RuntimeError("no gateway takes connections")

    async def grpc(self, method: str, **fields: Any) -> Any:
        if method == "Admit":
            stub, request = self._admission.Admit, admission_pb.AdmitRequest(**fields)
        else:
            stub, request = getattr(self._provisioner, method), getattr(pb, f"{method}Request")(**fields)
        return await stub(request, metadata=self._product.metadata, timeout=_DEADLINE_S)

    async def admit_for_ever(self, user_id: str) -> None:
        """Admits of a running engine, over both."""
        while True:
            await self._counted("REST admit", self.rest("POST", f"/{user_id}/admit", {}))
            await self._counted("Admit", self.grpc("Admit", user_id=user_id))
            await asyncio.sleep(_BETWEEN_ADMITS_S)

    async def live_for_ever(self, name: str) -> None:
        """Users who come, stop, start again and go."""
        for n in itertools.count():
            user_id = f"{name}-{n}"
            steps: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
                ("REST provision", lambda u=user_id: self.rest("POST", "/provision", {"user_id": u})),  # type: ignore[misc]
                ("StopEngine", lambda u=user_id: self.grpc("StopEngine", user_id=u)),  # type: ignore[misc]
                ("REST start", lambda u=user_id: self.rest("POST", f"/{u}/start")),  # type: ignore[misc]
                ("Admit", lambda u=user_id: self.grpc("Admit", user_id=u)),  # type: ignore[misc]
                ("REST destroy", lambda u=user_id: self.rest("DELETE", f"/{u}")),  # type: ignore[misc]
                ("Admit a new one", lambda u=user_id: self.grpc("Admit", user_id=u, auto_provision=True)),  # type: ignore[misc]
                ("DestroyEngine", lambda u=user_id: self.grpc("DestroyEngine", user_id=u)),  # type: ignore[misc]
            ]
            for what, step in steps:
                await self._counted(what, step())
            await asyncio.sleep(_BETWEEN_LIVES_S)

    async def sleep_for_ever(self, user_id: str) -> None:
        """An engine that is put to sleep and woken again and again."""
        while True:
            await self._counted("SleepEngine", self.grpc("SleepEngine", user_id=user_id))
            await self._counted("WakeEngine", self.grpc("WakeEngine", user_id=user_id))
            await asyncio.sleep(_BETWEEN_LIVES_S)

    async def watch_for_ever(self, user_id: str) -> None:
        """A watch that begins anew when it is told that its Provisioner or gateway goes."""
        while True:
            watch = self._provisioner.WatchEngine(
                pb.WatchEngineRequest(user_id=user_id), metadata=self._product.metadata
            )
            await self._counted("WatchEngine", asyncio.wait_for(watch.read(), _DEADLINE_S))
            try:
                while await watch.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.failures.append(f"WatchEngine: {error.code()} {error.details()}")

    async def _counted(self, what: str, call: Awaitable[Any]) -> None:
        self.calls[what] += 1
        try:
            await call
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{what}: {error.code()} {error.details()} {error.debug_error_string()}")
        except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{what}: {error!r}")


@asynccontextmanager
async def mixed_load(gateways: Sequence[str], product: Product) -> AsyncIterator[Callers]:
    """Calls of every kind within the block; those under way at its end are given up, and say nothing."""
    async with aiohttp.ClientSession() as session:
        callers = Callers(gateways, product, session)
        for user_id in ("awake", "tired"):
            await callers.rest("POST", "/provision", {"user_id": user_id})
        work = [
            asyncio.create_task(one)
            for one in (
                callers.admit_for_ever("awake"),
                callers.live_for_ever("a"),
                callers.live_for_ever("b"),
                callers.sleep_for_ever("tired"),
                callers.watch_for_ever("awake"),
            )
        ]
        try:
            yield callers
            for task in work:
                assert not task.done(), task.exception()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await callers.close()
