"""Admission inside of the gateway: how it begins and ends with it, and what becomes of calls that nobody waits for."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import pytest
from google.protobuf.message import Message

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.engine.v1 import engine_pb2
from services.cli.drain import drain
from services.cli.gateway import GatewaySettings, Lane, command, lane_environment, render
from tests.e2e import http2
from tests.e2e.gateway_process import DEADLINE_S, Inside, eventually, placed, running_gateway
from tests.e2e.gateway_services import Context, failing, running_services
from tests.harness import ROOT, Clients, Platform, Service

Shared = tuple[Platform, list[Service]]
REAL = "services.admission.lane:app"
ADMIT = "/september.admission.v1.AdmissionService/Admit"


def inside(shared: Shared) -> Inside:
    """The real Admission."""
    platform, (provisioner, *_) = shared
    return Inside(REAL, {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address})


def run(directory: Path, app: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A gateway that ends by itself."""
    config = directory / "envoy.yaml"
    config.write_text(render(GatewaySettings("127.0.0.1:0", None, "127.0.0.1:1", lane_app=app)))
    return subprocess.run(
        command(config), cwd=ROOT, env={**(lane_environment() or {}), **environment},
        capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip


def test_wrong_settings_are_refused_by_name(tmp_path: Path) -> None:
    ended = run(tmp_path, REAL, ORCH_MASTER_KEY="secret", ORCH_BOOT_TIMEOUT_S="soon")
    assert ended.returncode == 1
    lines = ended.stderr.removeprefix("admission: ").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["ORCH_BOOT_TIMEOUT_S", "ORCH_MASTER_KEY"]
    assert "secret" not in ended.stderr


def test_a_core_that_can_not_be_opened_ends_the_process_in_one_line(tmp_path: Path) -> None:
    ended = run(tmp_path, "tests.e2e.lane_app:absent")
    assert ended.returncode == 1
    assert ended.stderr == "admission: the registry is not available\n"


def test_background_work_that_fails_ends_the_process_and_says_why(tmp_path: Path) -> None:
    ended = run(tmp_path, "tests.e2e.lane_app:failing")
    assert ended.returncode == 1
    assert '"event": "admission_failed"' in ended.stderr
    assert "the loop fails" in ended.stderr


async def test_at_its_end_nothing_is_lost_of_what_was_decided(tmp_path: Path, shared: Shared, clients: Clients) -> None:
    product = await clients.register()
    replicas = shared[0].query("SELECT count(*) FROM admission_replicas WHERE died_at IS NULL")
    async with running_gateway(tmp_path, inside(shared), shared[1][0].address) as gateway:
        for _ in range(3):
            answer = await gateway.rest("POST", "/engines/ann/admit", headers=[("x-platform-key", product.key)])
            assert answer.json()["reason"] == "engine_not_found"
    denials = shared[0].query("SELECT sum(denials) FROM admit_denials WHERE product_id = %s", product.product_id)
    assert denials == [(3,)]
    assert shared[0].query("SELECT count(*) FROM admission_replicas WHERE died_at IS NULL") == replicas


async def test_a_boot_goes_on_when_its_caller_has_gone(tmp_path: Path, shared: Shared, clients: Clients) -> None:
    product = await clients.register()
    async with (
        running_gateway(tmp_path, inside(shared), shared[1][0].address) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        stub = AdmissionServiceStub(channel)
        call = stub.Admit(pb.AdmitRequest(user_id="ann", auto_provision=True), metadata=product.metadata)

        async def begun() -> bool:
            return bool(shared[0].query("SELECT 1 FROM engines WHERE product_id = %s", product.product_id))

        await eventually(begun)
        call.cancel()

        async def running() -> engine_pb2.Engine | None:
            engine = (await stub.GetEngine(pb.GetEngineRequest(user_id="ann"), metadata=product.metadata)).engine
            return engine if engine.status == engine_pb2.Engine.running else None

        assert await eventually(running)


async def test_a_deadline_of_the_caller_ends_its_call(tmp_path: Path) -> None:
    async def never(context: Context) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        running_services() as services,
        running_gateway(tmp_path, placed(Lane.FAST, services.address), services.address) as gateway,
    ):
        request = pb.AdmitRequest(user_id=services.on(never)).SerializeToString()
        headers = [("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "50m")]
        body = b"\0" + len(request).to_bytes(4, "big") + request
        # As headers of an answer in HTTP/1.1, which a client of gRPC would never wait for.
        answer = await gateway.rest("POST", ADMIT, body, headers)
        assert answer.header("grpc-status") == "4"


@pytest.mark.parametrize("lane", Lane)
async def test_a_gateway_that_drains_answers_what_is_under_way_and_takes_no_more(tmp_path: Path, lane: Lane) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(context: Context) -> Message:
        begun.set()
        await go_on.wait()
        return pb.AdmitResponse()

    async def watched(context: Context) -> AsyncIterator[Message]:
        await asyncio.Event().wait()
        yield pb.AdmitResponse()

    async with (
        running_services() as services,
        running_gateway(tmp_path, placed(lane, services.address), services.address) as gateway,
        aiohttp.ClientSession() as session,
    ):
        url = f"http://{gateway.address}/engines"
        call = asyncio.create_task(session.post(f"{url}/{services.on(slow)}/admit"))
        watch = asyncio.create_task(session.get(f"{url}/{services.on(watched)}/watch"))
        await begun.wait()
        draining = asyncio.create_task(asyncio.to_thread(drain, tmp_path / "admin", DEADLINE_S))

        async def closed() -> bool:
            try:
                await gateway.rest("GET", "/health")
            except OSError:
                return True
            return False

        await eventually(closed)
        assert not draining.done()
        go_on.set()
        assert (await call).status == 200
        # Nobody waits for the watch.
        await asyncio.wait_for(draining, DEADLINE_S)
        assert not watch.done()
        watch.cancel()


async def test_on_the_wire_a_status_is_in_trailers_after_a_message_and_else_in_headers(tmp_path: Path) -> None:
    async with (
        running_services() as services,
        running_gateway(tmp_path, placed(Lane.FAST, services.address), services.address) as gateway,
    ):
        for user_id, kinds in (
            ("ann", [http2.HEADERS, http2.DATA, http2.HEADERS]),
            (services.on(failing("RATE_LIMITED", "slow down")), [http2.HEADERS]),
        ):
            request = pb.AdmitRequest(user_id=user_id).SerializeToString()
            fields = [
                (":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", ADMIT),
                ("content-type", "application/grpc"), ("te", "trailers"),
            ]  # fmt: skip
            body = http2.data(1, b"\0" + len(request).to_bytes(4, "big") + request, end=True)
            host, port = gateway.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + http2.headers(1, fields) + body)
            answered = []
            async with asyncio.timeout(DEADLINE_S):
                async for kind, flags, stream, _ in http2.frames(reader):
                    if stream == 1 and kind in (http2.HEADERS, http2.DATA):
                        answered.append(kind)
                        if flags & http2.END_STREAM:
                            break
            writer.close()
            assert answered == kinds
