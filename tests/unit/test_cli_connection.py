"""How commands find the platform, its keys and its pages, and what they say when they don't."""

# ruff: noqa: N802 - gRPC names the methods

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from september.admission.v1.admission_service_pb2 import CheckHealthRequest, GetEngineRequest, GetEngineResponse
from september.admission.v1.admission_service_pb2_grpc import (
    AdmissionServiceServicer,
    add_AdmissionServiceServicer_to_server,
)
from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1.fleet_pb2 import EngineSummary
from september.provisioner.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from september.provisioner.v1.provisioner_service_pb2 import StopEngineRequest
from services.cli.connection import ADMIN_KEY, ADMISSION, PLATFORM_KEY, PROVISIONER, Connection, Metadata
from services.cli.failure import Failure
from services.cli.paging import listed
from services.cli.product import find
from services.cli.var_directory import VarDirectory
from services.shared.errors import InvalidAdminKey, InvalidPlatformKey, InvalidRequest, RemoteError, ServiceError
from services.shared.grpc_server import GrpcServer

ENGINES = [EngineSummary(user_id=f"u{n}") for n in range(2500)]
ANNOUNCED = {ADMISSION: "127.0.0.1:7", PROVISIONER: "127.0.0.1:8", PLATFORM_KEY: "pk-here", ADMIN_KEY: "it's here"}


class Admission(AdmissionServiceServicer):
    """Answers every user with the error that their id names."""

    async def GetEngine(self, request: GetEngineRequest, context: Any) -> GetEngineResponse:
        raise RemoteError(request.user_id, "a message", retry_after_s=2.5)

    async def Admit(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CheckHealth(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "from elsewhere")


class Fleet(FleetServiceServicer):
    """Has many engines; page tokens are positions."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    async def ListEngines(self, request: fleet_pb.ListEnginesRequest, context: Any) -> fleet_pb.ListEnginesResponse:
        self.limits.append(request.limit)
        begin = int(request.page_token or 0)
        end = begin + request.limit
        return fleet_pb.ListEnginesResponse(
            engines=ENGINES[begin:end], total=len(ENGINES), next_page_token=str(end) if end < len(ENGINES) else None
        )

    async def GetFleetStatus(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    GetFleetMetrics = GetEngineHistory = ListAuditEvents = GetFleetStatus


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
async def address(fleet: Fleet) -> AsyncIterator[str]:
    server = GrpcServer("127.0.0.1:0")
    add_AdmissionServiceServicer_to_server(Admission(), server.server)
    add_FleetServiceServicer_to_server(fleet, server.server)
    port = server.bind()
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def connection(directory: Path, announced: Mapping[str, str] | None = None, **given: str) -> Connection:
    """A connection beside a platform that announces itself."""
    var = VarDirectory(directory)
    with var.announced(announced or ANNOUNCED):
        return Connection(given, var)


def key(metadata: Metadata) -> tuple[str, str]:
    return metadata[0]


def test_the_platform_of_this_machine_is_found(tmp_path: Path) -> None:
    found = connection(tmp_path)
    assert key(found.platform_key()) == ("x-platform-key", "pk-here")
    assert key(found.admin_key()) == ("x-admin-key", "it's here")


def test_a_key_that_is_given_stands_before_one_that_is_found(tmp_path: Path) -> None:
    found = connection(tmp_path, PLATFORM_KEY="pk-given")
    assert key(found.platform_key()) == ("x-platform-key", "pk-given")
    assert key(found.admin_key()) == ("x-admin-key", "it's here")
    assert key(found.widest_key()) == ("x-platform-key", "pk-given")


def test_the_widest_key_is_the_operators_if_there_is_one(tmp_path: Path) -> None:
    assert key(connection(tmp_path).widest_key()) == ("x-admin-key", "it's here")
    assert key(connection(tmp_path, PLATFORM_KEY="p", ADMIN_KEY="a").widest_key()) == ("x-admin-key", "a")
    assert key(connection(tmp_path, announced={PLATFORM_KEY: "p"}).widest_key()) == ("x-platform-key", "p")


def test_keys_of_this_machine_are_shown_to_no_other(tmp_path: Path) -> None:
    elsewhere = "192.0.2.1:7001"
    for found in (connection(tmp_path, ADMISSION_ADDR=elsewhere), connection(tmp_path, PROVISIONER_ADDR=elsewhere)):
        with pytest.raises(InvalidPlatformKey):
            found.platform_key()
        with pytest.raises(InvalidAdminKey):
            found.admin_key()
        with pytest.raises(InvalidPlatformKey):
            found.widest_key()


@pytest.mark.parametrize("bad", ["", "é", "a\nb", "a\x00", "\udcff"])
def test_a_key_that_no_header_can_hold_is_a_wrong_key(tmp_path: Path, bad: str) -> None:
    found = connection(tmp_path, PLATFORM_KEY=bad, ADMIN_KEY=bad)
    with pytest.raises(InvalidPlatformKey):
        found.platform_key()
    with pytest.raises(InvalidAdminKey):
        found.admin_key()


@pytest.mark.parametrize("damaged", [b"ADMISSION_ADDR='127", b"\xff\xfe"])
def test_a_damaged_announcement_is_named(tmp_path: Path, damaged: bytes) -> None:
    var = VarDirectory(tmp_path)
    with var.announced({}):
        var.environment.write_bytes(damaged)
        with pytest.raises(Failure, match=str(var.environment)):
            Connection({}, var)


@pytest.mark.parametrize("address", ["", "host", ":7001", "host:", "host:x", "host:70000", "http://host"])
async def test_an_address_is_host_and_port(tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^PROVISIONER_ADDR: .*must be host:port or unix:/path$"):
        async with connection(tmp_path, PROVISIONER_ADDR=address).provisioner():
            pass


async def test_without_a_platform_here_its_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"ADMISSION_ADDR is not known.*september up") as error:
        async with Connection({}, VarDirectory(tmp_path)).admission():
            pass
    assert error.value.code == "UNAVAILABLE"


async def test_errors_of_the_table_come_as_they_were_answered(tmp_path: Path, address: str) -> None:
    found = connection(tmp_path, ADMISSION_ADDR=address)
    with pytest.raises(ServiceError, match=r"^a message$") as error:
        async with found.admission() as admission:
            await admission.GetEngine(GetEngineRequest(user_id="RATE_LIMITED"))
    assert (error.value.code, error.value.retry_after_s) == ("RATE_LIMITED", 2.5)


async def test_errors_of_grpc_itself_are_told_by_what_they_mean(tmp_path: Path, address: str) -> None:
    found = connection(tmp_path, ADMISSION_ADDR=address, PROVISIONER_ADDR=address)
    with pytest.raises(ServiceError, match=f"^{address} answers FAILED_PRECONDITION: from elsewhere$") as error:
        async with found.admission() as admission:
            await admission.CheckHealth(CheckHealthRequest())
    assert error.value.code == "INTERNAL"
    with pytest.raises(ServiceError, match=f"^{address} answers UNIMPLEMENTED") as error:
        async with found.provisioner() as provisioner:
            await provisioner.StopEngine(StopEngineRequest())
    with pytest.raises(ServiceError, match=f"^no answer from {address}") as error:
        async with found.admission() as admission:
            await admission.GetEngine(GetEngineRequest(user_id="INTERNAL"), timeout=-1)
    assert error.value.code == "UNAVAILABLE"


async def test_a_page_is_asked_for_once_and_says_that_there_are_more(
    tmp_path: Path, address: str, fleet: Fleet
) -> None:
    async with connection(tmp_path, PROVISIONER_ADDR=address).fleet() as stub:
        page = await listed(stub.ListEngines, fleet_pb.ListEnginesRequest(), (("x-admin-key", "a"),), limit=10)
    assert ([*page.engines], page.total, page.next_page_token) == (ENGINES[:10], len(ENGINES), "10")
    assert fleet.limits == [10]


async def test_all_pages_are_one_answer(tmp_path: Path, address: str, fleet: Fleet) -> None:
    async with connection(tmp_path, PROVISIONER_ADDR=address).fleet() as stub:
        answer = await listed(stub.ListEngines, fleet_pb.ListEnginesRequest(), (("x-admin-key", "a"),))
    assert ([*answer.engines], answer.total) == (ENGINES, len(ENGINES))
    assert not answer.HasField("next_page_token")
    assert fleet.limits == [1000] * 3


async def test_a_product_named_by_its_id_is_not_looked_up(tmp_path: Path) -> None:
    named = "8D6C0B52-6f33-4a43-9a5d-0f5a3f1f7b11"
    assert await find(Connection({}, VarDirectory(tmp_path)), named) == named
