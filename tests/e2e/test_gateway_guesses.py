"""What the gateway knows of wrong keys, from addresses that another proxy before it tells."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.cli.gateway import DIRECTORY
from services.shared.keys import new_platform_key
from tests.e2e.gateway_process import Gateway, eventually, running_gateway
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
async def callers(directory: Path, edit: Callable[[str], str] = behind_a_proxy) -> AsyncIterator[Callers]:
    async with (
        running_services() as services,
        running_gateway(directory, services.address, services.address, edit) as gateway,
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


# For the scripts alone: Envoy's allocator and the library that sets clocks of whole processes wait for each other.
CLOCK = """
local function ahead_s()
  local file = io.open("{file}")
  local ahead = file:read("*n")
  file:close()
  return ahead
end
local time, on_request, timestamp = os.time, envoy_on_request, nil
function os.time() return time() + ahead_s() end
function envoy_on_request(handle)
  local methods = getmetatable(handle)
  timestamp = timestamp or methods.timestamp
  methods.timestamp = function(self) return timestamp(self) + ahead_s() * 1000 end
  on_request(handle)
end
"""


async def test_floods_of_before_the_clock_was_set_back_are_forgotten(tmp_path: Path) -> None:
    script, file = tmp_path / "clock.lua", tmp_path / "ahead"
    script.write_text(CLOCK.replace("{file}", str(file)))
    file.write_text("0")

    def edit(config: str) -> str:
        last = f'dofile("{DIRECTORY}/gateway.lua")'
        assert last in config
        return behind_a_proxy(config).replace(last, f'{last} dofile("{script}")')

    async with callers(tmp_path, edit) as those:
        await those.flood("192.0.2.1")
        assert BY_GATEWAY in await those.refusals("192.0.2.1", those.wrong())
        file.write_text("-3600")
        assert await those.refusals("192.0.2.1", those.wrong()) == BY_SERVICE


async def test_more_than_is_passed_on_to_services_that_are_not_available_is_told_so(tmp_path: Path) -> None:
    async with callers(tmp_path) as those:
        await those.flood("192.0.2.1")
        down = those.services.on(failing("UNAVAILABLE", "no registry", 1))

        async def told() -> bool:
            both = {(grpc.StatusCode.UNAVAILABLE, by_service) for by_service in (True, False)}
            return await those.refusals("192.0.2.1", down) == both

        async def told_in_rest() -> bool:
            headers = [("x-forwarded-for", "192.0.2.1")]
            calls = (those.gateway.rest("POST", f"/engines/{down}/admit", headers=headers) for _ in range(20))
            answers = await asyncio.gather(*calls)
            assert {answer.header("retry-after") for answer in answers} == {"1"}
            return (503, "UNAVAILABLE", "the service is not available, try again") in {one.error() for one in answers}

        async def told_otherwise() -> bool:
            return BY_GATEWAY in await those.refusals("192.0.2.1", those.wrong())

        await eventually(told)
        await eventually(told_in_rest)
        await eventually(told_otherwise)


async def test_a_key_that_was_good_is_let_in_from_an_address_that_floods(tmp_path: Path) -> None:
    async with callers(tmp_path) as those:
        metadata = (("x-platform-key", new_platform_key()), ("x-forwarded-for", "192.0.2.1"))

        async def admit() -> None:
            await those.stub.Admit(AdmitRequest(user_id="ada"), metadata=metadata)

        await admit()
        await those.flood("192.0.2.1")
        await asyncio.gather(*(admit() for _ in range(MANY)))
