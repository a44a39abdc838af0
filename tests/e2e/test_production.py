"""The production example as it is in deploy/envoy/production: its settings, with certificates made by its script."""

import asyncio
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.shared.tls import Identity, channel
from tests.e2e.certificates import EXAMPLE, make_certificates
from tests.e2e.gateway_process import DEADLINE_S, Gateway, eventually, started_gateway
from tests.harness import Platform, Service

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None or shutil.which("curl") is None, reason="no openssl, or no curl"
)

GATEWAY = [sys.executable, "-m", "services.cli", "gateway"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


def identity(certificates: Path, part: str) -> Identity:
    return Identity(certificates / f"{part}.pem", certificates / f"{part}.key", certificates / "ca.pem")


def settings_of(part: str, certificates: Path) -> dict[str, str]:
    """The example's settings of TLS, with these certificates."""
    lines = [line for line in (EXAMPLE / f"{part}.env").read_text().splitlines() if not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    at = "/etc/september/tls"
    return {name: value.replace(at, str(certificates)) for name, value in settings.items() if value.startswith(at)}


@dataclass(frozen=True)
class Example:
    """The example, running."""

    platform: Platform
    provisioner: Service
    admission: Service
    gateway: Gateway
    certificates: Path

    async def curl(self, listener: str, path: str, *options: str) -> tuple[str, Any]:
        """Version of HTTP and status, and the answer's JSON."""
        port = listener.rpartition(":")[2]
        process = await asyncio.create_subprocess_exec(
            "curl", "--silent", "--show-error", "--cacert", str(self.certificates / "ca.pem"),
            "--write-out", "\n%{http_version} %{http_code}", *options, f"https://localhost:{port}{path}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 0
        body, _, status = output.decode().rpartition("\n")
        return status, json.loads(body)


def gateways_environment(directory: Path, certificates: Path, admission: str, provisioner: str) -> dict[str, str]:
    """The example's settings of the gateway, before services at these addresses."""
    return {
        "PATH": os.environ["PATH"],
        **settings_of("gateway", certificates),
        "ORCH_GATEWAY_LISTEN": "127.0.0.1:0",
        "ORCH_GATEWAY_ADMIN_LISTEN": "127.0.0.1:0",
        "ORCH_ADMISSION_ADDR": admission,
        "ORCH_PROVISIONER_ADDR": provisioner,
        "ORCH_VAR_DIR": str(directory / "gateway"),
        "ORCH_DRAIN_S": "0",
    }


@asynccontextmanager
async def running_gateway(
    directory: Path, certificates: Path, admission: str, provisioner: str
) -> AsyncIterator[Gateway]:
    """`september gateway` with these settings."""
    environment = gateways_environment(directory, certificates, admission, provisioner)
    run = directory / "gateway" / "run"
    run.mkdir(parents=True)
    async with started_gateway(GATEWAY, environment, run / "gateway.admin") as gateway:
        yield gateway


@pytest.fixture
async def example(platform: Platform, certificates: Path, tmp_path: Path) -> AsyncIterator[Example]:
    provisioner = platform.provisioner(**settings_of("provisioner", certificates))
    admission = platform.admission(provisioner, **settings_of("admission", certificates))
    async with running_gateway(tmp_path, certificates, admission.address, provisioner.address) as gateway:
        yield Example(platform, provisioner, admission, gateway, certificates)


async def code(called: grpc.aio.Channel) -> grpc.StatusCode:
    """The status of a call on this channel that any part may make."""
    call: Any = called.unary_unary("/grpc.health.v1.Health/Check")
    try:
        await call(b"", timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_rest_and_grpc_are_served_over_tls_and_operators_on_a_listener_of_their_own(example: Example) -> None:
    gateway, admin = example.gateway, f"x-admin-key: {example.platform.admin_key}"
    registration = json.dumps({"slug": "shop", "policy": {"max_engines": 1}})
    path = "/products/register"
    # Often, because an answer that comes before all was sent is lost to curl only if it is quick.
    for _ in range(20):
        status, refused = await example.curl(gateway.address, path, "--header", admin, "--data", registration)
        assert (status, refused["error"]["code"]) == ("2 404", "ROUTE_NOT_FOUND")
    status, product = await example.curl(gateway.operators, path, "--header", admin, "--data", registration)
    assert status == "2 200"

    assert await example.curl(gateway.address, "/health", "--http1.1") == ("1.1 200", {"status": "ok"})
    key = product["platform_api_key"]
    status, answer = await example.curl(
        gateway.address, "/engines/ada/admit", "--header", f"x-platform-key: {key}", "--data", '{"auto_provision":true}'
    )
    assert (status, answer["admitted"]) == ("2 200", True)
    trusted = grpc.ssl_channel_credentials((example.certificates / "ca.pem").read_bytes())
    async with grpc.aio.secure_channel(gateway.address, trusted) as called:
        admitted = await AdmissionServiceStub(called).Admit(
            AdmitRequest(user_id="ada"), metadata=[("x-platform-key", key)]
        )
    assert admitted.engine.engine_id == answer["engine"]["engine_id"]


async def test_without_a_certificate_of_the_ca_no_part_answers(example: Example, tmp_path: Path) -> None:
    make_certificates(tmp_path / "strangers")
    known, stranger = identity(example.certificates, "gateway"), identity(tmp_path / "strangers", "gateway")
    forged = Identity(stranger.certificate, stranger.key, known.ca)
    # For products, and so for none of our clients.
    public = identity(example.certificates, "public")
    for part, service in (("provisioner", example.provisioner), ("admission", example.admission)):
        ca = grpc.ssl_channel_credentials(known.ca.read_bytes())
        named = (("grpc.ssl_target_name_override", part),)
        async with (
            channel(service.address, part, known, ()) as trusted,
            channel(service.address, part, forged, ()) as untrusted,
            channel(service.address, part, public, ()) as of_another_use,
            channel(service.address, part, None, ()) as without_tls,
            grpc.aio.secure_channel(service.address, ca, options=named) as without_certificate,
        ):
            assert await code(trusted) is grpc.StatusCode.OK
            for refused in (untrusted, of_another_use, without_tls, without_certificate):
                assert await code(refused) is grpc.StatusCode.UNAVAILABLE


async def test_a_part_that_is_not_the_one_that_is_called_gets_no_call(
    platform: Platform, certificates: Path, tmp_path: Path
) -> None:
    """A stolen certificate of one part does not make another of its holder."""
    provisioner = platform.provisioner(**settings_of("admission", certificates))
    async with running_gateway(tmp_path, certificates, provisioner.address, provisioner.address) as gateway:
        example = Example(platform, provisioner, provisioner, gateway, certificates)
        status, answer = await example.curl(gateway.operators, "/products", "--header", "x-admin-key: secret")
        assert (status, answer["error"]["code"]) == ("2 503", "UNAVAILABLE")
    async with channel(provisioner.address, "provisioner", identity(certificates, "admission"), ()) as called:
        assert await code(called) is grpc.StatusCode.UNAVAILABLE


async def test_a_second_gateway_in_a_directory_is_refused_and_disturbs_nothing(
    certificates: Path, tmp_path: Path
) -> None:
    async with running_gateway(tmp_path, certificates, "127.0.0.1:1", "127.0.0.1:1") as gateway:
        run = tmp_path / "gateway" / "run"
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        second = await asyncio.create_subprocess_exec(
            *GATEWAY,
            env=gateways_environment(tmp_path, certificates, "127.0.0.1:2", "127.0.0.1:2"),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await asyncio.wait_for(second.communicate(), DEADLINE_S)
        finally:
            with suppress(ProcessLookupError):
                second.kill()
        assert second.returncode == 1
        assert f"pid {gateway.process.pid}" in said.decode()
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
async def test_versions_of_tls_before_1_2_are_refused(
    certificates: Path, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    async with running_gateway(tmp_path, certificates, "127.0.0.1:1", "127.0.0.1:1") as gateway:
        host, port = gateway.address.split(":")
        opened = asyncio.open_connection(host, int(port), ssl=context)
        if version is ssl.TLSVersion.TLSv1_1:
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                await opened
        else:
            _, writer = await opened
            writer.close()
            await writer.wait_closed()


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    make_certificates(certificates)
    old = (certificates / "public.pem").read_text()
    async with running_gateway(tmp_path, certificates, "127.0.0.1:1", "127.0.0.1:1") as gateway:

        async def shown() -> str:
            host, port = gateway.address.split(":")
            return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))

        async def shows_the_new_one() -> bool:
            return await shown() == (certificates / "public.pem").read_text()

        assert await shown() == old
        (certificates / "public.pem").unlink()
        make_certificates(certificates)
        assert (certificates / "public.pem").read_text() != old
        await eventually(shows_the_new_one)


async def test_a_service_shows_its_renewed_certificate_without_a_restart(platform: Platform, tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    make_certificates(certificates)
    provisioner = platform.provisioner(**settings_of("provisioner", certificates))
    for name in ("ca.pem", "ca.key", "provisioner.pem", "gateway.pem"):
        (certificates / name).unlink()
    make_certificates(certificates)
    async with channel(provisioner.address, "provisioner", identity(certificates, "gateway"), ()) as called:
        assert await code(called) is grpc.StatusCode.OK


def test_certificates_that_are_good_stay_and_keys_are_for_their_owner_alone(certificates: Path) -> None:
    before = {path.name: path.read_bytes() for path in certificates.iterdir()}
    make_certificates(certificates)
    assert {path.name: path.read_bytes() for path in certificates.iterdir()} == before
    assert len(before) == 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in certificates.glob("*.key")} == {0o600}


def test_a_certificate_that_ends_within_a_month_is_signed_anew_for_the_same_key(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    key, ends = (tmp_path / "admission.key").read_bytes(), ("-set_serial", "1", "-days", "20", "-CA", "ca.pem")
    request = subprocess.run(
        ["openssl", "req", "-new", "-key", "admission.key", "-subj", "/CN=admission"],
        cwd=tmp_path, check=True, capture_output=True,
    ).stdout  # fmt: skip
    subprocess.run(
        ["openssl", "x509", "-req", "-CAkey", "ca.key", "-out", "admission.pem", *ends],
        cwd=tmp_path, check=True, input=request, capture_output=True,
    )  # fmt: skip
    make_certificates(tmp_path)
    subprocess.run(
        ["openssl", "x509", "-in", "admission.pem", "-noout", "-checkend", str(300 * 86400)],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "admission.key").read_bytes() == key


@pytest.mark.parametrize("name", ["shop.example", "*.shop.example", "10.0.0.1", "2001:db8::1"])
def test_a_further_name_makes_a_new_certificate_of_the_gateway_alone(tmp_path: Path, name: str) -> None:
    make_certificates(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, name)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {file for file in after if after[file] != before[file]} == {"public.pem"}
    make_certificates(tmp_path, name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == after


def test_certificates_of_another_ca_are_signed_anew(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for file in ("ca.pem", "ca.key"):
        (tmp_path / file).unlink()
    make_certificates(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    parts = ("provisioner", "admission", "gateway", "public")
    assert {file for file in after if after[file] != before[file]} == {"ca.key", *(f"{p}.pem" for p in ("ca", *parts))}


async def test_parts_on_one_machine_may_talk_over_sockets(
    platform: Platform, tmp_path: Path, connect: Callable[..., Any]
) -> None:
    (tmp_path / "sockets").mkdir(0o700)
    address = f"unix:{tmp_path}/sockets/provisioner"
    provisioner = platform.provisioner(ORCH_PROVISIONER_LISTEN=address)
    provisioner.address = address
    admission = platform.admission(provisioner)
    product = await connect(platform, provisioner, admission).register()
    answer = await connect(platform, provisioner, admission).admission.Admit(
        AdmitRequest(user_id="ada", auto_provision=True), metadata=product.metadata
    )
    assert answer.admitted
