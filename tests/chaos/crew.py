"""Provisioners that are killed, or stopped, and replaced under callers who do not give up."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import grpc
import psutil
from grpc_status import rpc_status

from services.shared.failpoints import VARIABLE, Point
from tests.harness import Clients, Platform, Service, eventually, reason


class Crew:
    """The Provisioners of a platform, with failpoints.

    Args:
        platform: theirs.
        pool: size of their warm pool.
    """

    def __init__(self, platform: Platform, *, pool: int = 0) -> None:
        self.platform = platform
        self._pool = pool
        self._links = platform.directory / "failpoints"
        self._links.mkdir()
        self._settings = {
            "ORCH_OPERATION_LEASE_S": "1",
            "ORCH_WARM_POOL_SIZE": str(pool),
            VARIABLE: str(self._links),
        }
        self._clients: dict[Service, Clients] = {}
        self._exposed: list[Service] = []

    async def muster(self, size: int) -> None:
        """Starts or ends Provisioners until so many live."""
        while len(self.living()) > size:
            last = self.living()[-1]
            assert await asyncio.to_thread(last.terminate) == 0
        while len(self.living()) < size:
            service = await asyncio.to_thread(self.platform.provisioner, **self._settings)
            self._clients[service] = Clients(self.platform, service.address)

    def living(self) -> list[Service]:
        return [service for service in self._clients if service.process.poll() is None]

    def clients(self) -> list[Clients]:
        """Of those that live."""
        return [self._clients[service] for service in self.living()]

    def is_at_rest(self) -> bool:
        """Whether nothing is under way, and the pool is full."""
        pool = self.platform.query("SELECT count(*) FROM engines WHERE product_id IS NULL AND status = 'running'")
        return self.platform.open_operations() == 0 and pool == [(self._pool,)]

    def break_at(self, point: Point, action: Literal["SIGKILL", "SIGSTOP"] = "SIGKILL") -> None:
        """The first of those that live to come to the point is to be killed or stopped there."""
        self._exposed = self.living()
        (self._links / point).symlink_to(action)

    async def broken(self, point: Point) -> Service:
        """Waits until one has been killed or stopped at the point, perhaps long ago; returns it."""

        def is_broken(service: Service) -> bool:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(service.process.pid).status() == psutil.STATUS_STOPPED:
                    return True
            return service.process.poll() is not None

        def found() -> Service | None:
            return next(filter(is_broken, self._exposed), None)

        service: Service = await asyncio.to_thread(eventually, found, f"one is broken at {point}")
        return service

    async def told(self, call: Callable[[Clients], Any], refusal: str | None = None) -> Any:
        """The answer of a call that is made again, wherever somebody lives, until it has one.

        Args:
            call: makes it, with its idempotency key.
            refusal: code of the error that is the right answer; it is answered with None.
        """
        async with asyncio.timeout(90):
            while True:
                for clients in self.clients():
                    try:
                        return await call(clients)
                    except grpc.aio.AioRpcError as error:
                        # Without details it was never answered.
                        answered = rpc_status.from_call(error) is not None  # type: ignore[arg-type]
                        if answered and reason(error) == refusal:
                            return None
                        if answered and reason(error) != "UNAVAILABLE":
                            raise
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        for clients in self._clients.values():
            await clients.close()
