"""What the gateway knows of wrong keys, from addresses that another proxy before it tells."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.shared.keys import new_platform_key
from tests.e2e.gateway_process import Gateway, running_gateway
from tests.e2e.gateway_services import Services, failing, running_services

# Fewer than are let through at once of an address, and more than in a few seconds of one that floods.
MANY = 400


def behind_a_proxy(config: str) -> str:
    return config.replace("use_remote_address: true", "use_remote_address: true\n          xff_num_trusted_hops: 1")


@dataclass(frozen=True)
class Callers:
    """Callers of many addresses, on one connection, and so in one of the gateway's threads."""

    gateway: Gateway
    services: Services
    stub: AdmissionServiceStub

    def wrong(self) -> str:
        return self.services.on(failing("INVALID_PLATFORM_KEY", "unknown"))

    async def refusal(self, address: str, user_id: str) -> tuple[grpc.StatusCode, bool]:
        """What a new key gets: the status, and whether it is a service's."""
        metadata = (("x-platform-key", new_platform_key()), ("x-forwarded-for", address))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.stub.Admit(AdmitRequest(user_id=user_id), metadata=metadata)
        return raised.value.code(), "grpc-status-details-bin" in (raised.value.trailing_metadata() or ())

    async def refusals(self, address: str, user_id: str) -> set[tuple[grpc.StatusCode, bool]]:
        """What many get at once."""
        return set(await asyncio.gather(*(self.refusal(address, user_id) for _ in range(MANY))))

    async def flood(self, address: str) -> None:
        """Has a service say of it that it floods."""
        too_many = self.services.on(failing("RATE_LIMITED", "too many wrong keys from this address", 1))
        assert await self.refusal(address, too_many) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


@asynccontextmanager
async def callers(directory: Path) -> AsyncIterator[Callers]:
    async with (
        running_services() as services,
        running_gateway(directory, services.address, services.address, behind_a_proxy) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        yield Callers(gateway, services, AdmissionServiceStub(channel))


BY_SERVICE = {(grpc.StatusCode.UNAUTHENTICATED, True)}
BY_GATEWAY = (grpc.StatusCode.RESOURCE_EXHAUSTED, False)


async def test_addresses_of_one_network_flood_together(tmp_path: Path) -> None:
    async with callers(tmp_path) as those:
        for flooding, same, other in (
            ("2001:db8::1", "2001:db8::1:0:0:1", "2001:db8:0:1::1"),
            ("2001:db8:0:2::", "2001:db8::2:3:4:5:6", "2001:db8:2::2:3:4:5"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", "2001:db8:1:3:3:4:5:6"),
            ("::1:2:3:4:5:6", "0:0:1:2::", "::1:0:2:3:4:5:6"),
            ("::2", "::192.0.2.1", "::1:0:0:0:0"),
            ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ):
            await those.flood(flooding)
            assert BY_GATEWAY in await those.refusals(same, those.wrong()), same
            assert await those.refusals(other, those.wrong()) == BY_SERVICE, other
