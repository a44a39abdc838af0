"""Clients of gRPC as others publish them, against the gateway in both lanes: they must not notice which one it is."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.cli.gateway import DIRECTORY, Lane
from tests.e2e.gateway_process import Gateway
from tests.e2e.gateway_services import Context, Services, failing, gateway_and_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

DESCRIPTOR = DIRECTORY / "descriptor.binpb"
CLIENT = Path(__file__).with_name("stock_client.js")
KEY = "pk-sept-1"


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = tmp_path_factory.mktemp("gateway")
    async with gateway_and_services(request.param, directory) as (gateway, services):
        yield Served(gateway, services)


async def never(context: Context) -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def reason(status: Status) -> str:
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


def stub(channel: grpc.Channel) -> Any:
    return AdmissionServiceStub(channel)  # type: ignore[arg-type] # its stubs know only grpc.aio


async def test_grpcio_over_several_connections_at_once(served: Served) -> None:
    def many(number: int) -> list[str]:
        with grpc.insecure_channel(served.gateway.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            calls = [
                stub(channel).Admit.future(
                    pb.AdmitRequest(user_id=f"{number}-{i}"),
                    metadata=[("x-platform-key", KEY)],
                    compression=grpc.Compression.Gzip if i % 2 else grpc.Compression.NoCompression,
                    timeout=10,
                )
                for i in range(100)
            ]
            return [call.result().engine.user_id for call in calls]

    with ThreadPoolExecutor(5) as threads:
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(*(loop.run_in_executor(threads, many, number) for number in range(5)))
    assert answers == [[f"{number}-{i}" for i in range(100)] for number in range(5)]
    assert served.services.calls["3-3"][0].values("x-platform-key") == [KEY]


async def test_grpcio_gets_errors_deadlines_and_can_cancel(served: Served) -> None:
    limited = served.services.on(failing("RATE_LIMITED", "100%, größer", 1.5))
    waiting = served.services.on(never)

    def calls() -> None:
        with grpc.insecure_channel(served.gateway.address) as channel:
            with pytest.raises(grpc.RpcError) as raised:
                stub(channel).Admit(pb.AdmitRequest(user_id=limited))
            error: Any = raised.value
            status = rpc_status.from_call(error)
            assert status is not None
            assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "100%, größer")
            assert reason(status) == "RATE_LIMITED"
            with pytest.raises(grpc.RpcError) as raised:
                stub(channel).Admit(pb.AdmitRequest(user_id=waiting), timeout=0.1)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            call = stub(channel).Admit.future(pb.AdmitRequest(user_id=waiting))
            call.cancel()
            with pytest.raises(grpc.FutureCancelledError):
                call.result()
            # The connection is as good as before.
            assert stub(channel).Admit(pb.AdmitRequest(user_id="after")).engine.user_id == "after"

    await asyncio.to_thread(calls)


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm")
    directory = tmp_path_factory.mktemp("node")
    subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", directory,
         "@grpc/grpc-js@1", "@grpc/proto-loader@0.8"],
        check=True, timeout=120,
    )  # fmt: skip
    return directory / "node_modules"


async def output(*command: str, **environment: str) -> tuple[int | None, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, stdout, stderr


async def test_grpc_js(served: Served, node_modules: Path) -> None:
    async def admit(user_id: str, timeout_ms: int = 10_000) -> dict[str, Any]:
        arguments = [served.gateway.address, str(DESCRIPTOR), user_id, KEY, str(timeout_ms)]
        code, stdout, stderr = await output("node", str(CLIENT), *arguments, NODE_PATH=str(node_modules))
        assert code == 0, stderr
        answer: dict[str, Any] = json.loads(stdout)
        return answer

    limited, waiting = served.services.on(failing("RATE_LIMITED", "100%, größer", 1.5)), served.services.on(never)
    success, error, late = await asyncio.gather(admit("js"), admit(limited), admit(waiting, 500))
    assert success == {"code": 0, "message": "", "details": "", "engine_user_id": "js"}
    assert served.services.calls["js"][-1].values("x-platform-key") == [KEY]
    assert (error["code"], error["message"]) == (8, "100%, größer")
    assert reason(Status.FromString(base64.b64decode(error["details"]))) == "RATE_LIMITED"
    assert late["code"] == 4


@pytest.fixture(scope="session")
def grpcurl(tmp_path_factory: pytest.TempPathFactory) -> str:
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go")
    directory = tmp_path_factory.mktemp("go")
    subprocess.run(
        [go, "install", "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4"],
        env={**os.environ, "GOBIN": str(directory)}, check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    return str(directory / "grpcurl")


@pytest.mark.long
async def test_grpcurl(served: Served, grpcurl: str) -> None:
    async def admit(user_id: str) -> tuple[int | None, bytes, bytes]:
        return await output(
            *(grpcurl, "-plaintext", "-protoset", str(DESCRIPTOR), "-H", f"x-platform-key: {KEY}", "-max-time", "5"),
            *("-d", json.dumps({"user_id": user_id}), served.gateway.address),
            "september.admission.v1.AdmissionService/Admit",
        )

    code, stdout, stderr = await admit("go")
    assert code == 0, stderr
    assert json.loads(stdout)["engine"]["userId"] == "go"
    code, _, stderr = await admit(served.services.on(failing("RATE_LIMITED", "slow down", 1.5)))
    assert code == 64 + 8
    assert b"RATE_LIMITED" in stderr
    assert b"slow down" in stderr
