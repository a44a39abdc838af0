"""What malformed input is aimed at: both services, and a gateway in each lane before them."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.cli.gateway import Lane
from tests.e2e.gateway_process import Gateway, Inside, running_gateway
from tests.fuzz.corpus import SMUGGLED
from tests.harness import Clients, Platform, Product, Service, running_platform

# What an input may take, of a machine that is busy with others; the gateway gives up on what never ends after 2 s.
DEADLINE_S = 20.0
_NEVER_COMPLETE_S = 2
# How much a process may grow. An allocator that keeps what it had once stays below, a leak of every input does not.
_GROWTH_BYTES = 96 * 2**20
_FAILURES = ("Traceback", "call_failed", "call_cancelled_inside", "script log", "assert failure", "Caught ")


class Verdict(NamedTuple):
    """Of an answer: what is to be said against it, if anything, and whether it is a refusal."""

    complaint: str | None
    refusal: bool


@dataclass
class Tally:
    """How often inputs were sent, how many there were, how many of them were refused, and what was not as it must be.

    Args:
        inputs, refused: hashes.
    """

    sent: int = 0
    inputs: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    bad: list[str] = field(default_factory=list)

    def count(self, verdict: Verdict, what: object) -> None:
        """Notes that an input was sent to one that takes such."""
        self.sent += 1
        of = hash(what if isinstance(what, bytes) else repr(what))
        self.inputs.add(of)
        if verdict.refusal:
            self.refused.add(of)
        if verdict.complaint is not None:
            self.bad.append(f"{verdict.complaint}: {what!r:.2000}")

    def add(self, other: "Tally") -> None:
        self.sent += other.sent
        self.inputs |= other.inputs
        self.refused |= other.refused
        self.bad += other.bad


class _Part(NamedTuple):
    name: str
    pid: int
    ended: bool
    log: Path


@dataclass(frozen=True)
class Targets:
    """A platform to aim at.

    Args:
        product: has all the engines it may have, so that no input boots one.
        user_id: of its one engine.
        changed_id: UUID of a product that inputs may change.
    """

    platform: Platform
    provisioner: Service
    admission: Service
    gateways: dict[Lane, Gateway]
    product: Product
    user_id: str
    changed_id: str

    @property
    def listeners(self) -> list[str]:
        """Every address of a gateway."""
        return [address for gateway in self.gateways.values() for address in (gateway.address, gateway.operators)]

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The product's key and the operators' one."""
        return [("x-platform-key", self.product.key), ("x-admin-key", self.platform.admin_key)]

    def memory(self) -> dict[str, int]:
        """Bytes of each process, by its name."""
        return {part.name: psutil.Process(part.pid).memory_info().rss for part in self._parts()}

    def complaints(self, before: dict[str, int]) -> list[str]:
        """What became of the processes and their logs, as far as it must not.

        Args:
            before: their memory before the inputs.
        """
        if dead := [f"{part.name} has ended" for part in self._parts() if part.ended]:
            return dead
        grown = [
            f"{name} has grown from {before[name] >> 20} to {now >> 20} MiB"
            for name, now in self.memory().items()
            if now > before[name] + _GROWTH_BYTES
        ]
        logged = [
            f"{part.name}: {line:.2000}"
            for part in self._parts()
            for line in part.log.read_text(errors="replace").splitlines()
            if any(failure in line for failure in _FAILURES)
        ]
        called = (call["path"] for gateway in self.gateways.values() for call in gateway.calls())
        smuggled = [f"{path} was called" for path in called if path and SMUGGLED in path]
        return [*grown, *logged, *smuggled]

    def _parts(self) -> list[_Part]:
        services = {"provisioner": self.provisioner, "admission": self.admission}
        return [
            *(_Part(name, s.process.pid, s.process.poll() is not None, s.log_file) for name, s in services.items()),
            *(
                _Part(f"gateway {lane}", g.process.pid, g.process.returncode is not None, g.log)
                for lane, g in self.gateways.items()
            ),
        ]


@asynccontextmanager
async def running_targets(database_url: str, directory: Path) -> AsyncIterator[Targets]:
    """Starts it all, with one engine."""

    def impatient(config: str) -> str:
        for limit in ("request_headers_timeout: 10s", "request_timeout: 15s"):
            assert limit in config
            config = config.replace(limit, f"{limit.split(':')[0]}: {_NEVER_COMPLETE_S}s")
        return config

    async with AsyncExitStack() as stack:
        ports = {"ORCH_PORT_MIN": "22000", "ORCH_PORT_MAX": "22099", "ORCH_WARM_POOL_SIZE": "0"}
        platform = stack.enter_context(running_platform(database_url, directory, **ports))
        provisioner = platform.provisioner()
        admission = platform.admission(provisioner)
        inside = Inside(
            "services.admission.lane:app", {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
        )
        gateways = {}
        for lane, one in ((Lane.GRPC, admission.address), (Lane.FAST, inside)):
            (directory / lane).mkdir()
            gateways[lane] = await stack.enter_async_context(
                running_gateway(directory / lane, one, provisioner.address, impatient)
            )
        clients = Clients(platform, provisioner.address, admission.address)
        try:
            product, changed = await clients.register(max_engines=1), await clients.register()
            await clients.provisioner.ProvisionEngine(
                pb.ProvisionEngineRequest(user_id="ann"), metadata=product.metadata
            )
        finally:
            await clients.close()
        yield Targets(platform, provisioner, admission, gateways, product, "ann", changed.product_id)


def rest_verdict(status: int, body: bytes) -> Verdict:
    """Of a REST answer."""
    if status == 200:
        return Verdict(None, False)
    try:
        error = json.loads(body)["error"]
        assert error["code"].isupper()
        assert error["message"]
    except (ValueError, KeyError, TypeError, AssertionError):
        return Verdict(f"{status} without the form of an error, {body!r}", False)
    return Verdict(f"{status} {error}", False) if status >= 500 else Verdict(None, True)
