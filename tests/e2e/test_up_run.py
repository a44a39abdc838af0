"""`september up`: one command starts everything, one signal ends everything."""

import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg
import pytest

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from tests.e2e.certificates import make_certificates
from tests.e2e.installation import Installation, install, post
from tests.harness import DEADLINE_S, eventually

__all__ = ["install"]

Install = Callable[..., Installation]
EVERYTHING = {"cli", "postgres", "provisioner", "envoy", "engine"}
LANES = {"fast": EVERYTHING, "grpc": EVERYTHING | {"admission"}}
HELLO = {"conversation_id": "c1", "message": "hello"}
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def execute(engine: dict[str, Any], key: str) -> tuple[int, bytes]:
    return post(f"{engine['url']}/execute", HELLO, X_Engine_Key=key)


def part(installation: Installation, module: str) -> psutil.Process:
    return next(p for p in installation.processes() if module in " ".join(p.cmdline()))


def is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize("lane", LANES)
def test_serves_until_ctrl_c_and_then_leaves_nothing_running(install: Install, lane: str) -> None:
    installation = install()
    up = installation.up("--lane", lane)
    shell = installation.announced()
    assert (shell["REST_URL"] == f"http://{shell['ADMISSION_ADDR']}") == (lane == "fast")
    ada, bob = installation.admit("ada"), installation.admit("bob")
    assert execute(ada, ada["api_key"])[0] == 200
    assert execute(ada, bob["api_key"])[0] == 401
    assert installation.names() == LANES[lane]
    with grpc.insecure_channel(shell["ADMISSION_ADDR"]) as channel:
        stub: Any = AdmissionServiceStub(channel)  # type: ignore[arg-type] # its stubs know only grpc.aio
        metadata = [("x-platform-key", shell["PLATFORM_KEY"])]
        assert stub.Admit(AdmitRequest(user_id="ada"), metadata=metadata).admitted

    up.send_signal(signal.SIGINT)
    assert up.wait(DEADLINE_S) == 0, installation.output.read_text()
    assert installation.processes() == []
    addresses = [
        shell["REST_URL"],
        shell["ADMIN_URL"],
        ada["url"],
        bob["url"],
        shell["ADMISSION_ADDR"],
        shell["PROVISIONER_ADDR"],
    ]
    assert all(is_free(address.removeprefix("http://")) for address in addresses)


def test_the_next_start_finds_the_same_product_and_the_same_engine(install: Install) -> None:
    installation = install()
    up = installation.up()
    shell, before = installation.announced(), installation.admit()
    execute(before, before["api_key"])
    up.terminate()
    assert up.wait(DEADLINE_S) == 0

    installation.up()
    again, after = installation.announced(), installation.admit()
    assert [again[name] for name in ("PLATFORM_KEY", "ADMIN_KEY")] == [shell["PLATFORM_KEY"], shell["ADMIN_KEY"]]
    assert (after["engine_id"], after["api_key"]) == (before["engine_id"], before["api_key"])
    _, answer = execute(after, after["api_key"])
    assert json.loads(answer.rpartition(b"data: ")[2])["turn"] == 2


def test_what_it_keeps_is_for_its_user_alone(install: Install) -> None:
    installation = install()
    installation.up()
    for directory in ("run", "secrets", "log"):
        assert stat.S_IMODE((installation.var / directory).stat().st_mode) == 0o700
    secrets = [installation.var / "run" / "env", *(installation.var / "secrets").iterdir()]
    assert len(secrets) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}

    visible = [installation.output.read_text(), *(path.read_text() for path in (installation.var / "log").iterdir())]
    visible += [" ".join(process.cmdline()) for process in installation.processes()]
    for secret in (installation.var / "secrets").iterdir():
        assert not [text for text in visible if secret.read_text().strip() in text]


def test_the_gateway_knows_no_secret_that_nothing_inside_of_it_needs(install: Install) -> None:
    installation = install()
    installation.up()
    known = part(installation, "bin/envoy").environ()
    assert {"ORCH_MASTER_KEY_FILE", "ORCH_DATABASE_URL"} <= set(known)
    assert not {"ORCH_ADMIN_KEY", "ORCH_ADMIN_KEY_FILE"} & set(known)
    assert not [name for name, value in known.items() if value == installation.announced()["ADMIN_KEY"]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_printed_session_works_when_it_is_pasted(install: Install) -> None:
    installation = install()
    installation.up()
    session = "\n".join(line for line in installation.output.read_text().splitlines() if line.startswith("  "))
    pasted = subprocess.run(["sh", "-e"], input=session, capture_output=True, text=True, check=True)
    assert '"admitted":true' in pasted.stdout
    assert "event: done" in pasted.stdout


@pytest.mark.parametrize("variable", ["ORCH_GATEWAY_LISTEN", "ORCH_ADMISSION_LISTEN", "ORCH_PROVISIONER_LISTEN"])
def test_a_taken_port_is_a_clear_error_before_anything_is_started(install: Install, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        installation = install(**{variable: f"127.0.0.1:{port}"})
        refused = installation.run("up", "--lane", "grpc")
    assert refused.returncode == 1
    assert refused.stderr == f"september: port {port} is taken; {variable} chooses another one\n"
    assert not (installation.var / "postgres").exists()


def test_a_second_one_on_the_same_directory_is_refused(install: Install) -> None:
    installation = install()
    up = installation.up()
    refused = installation.run("up")
    assert refused.returncode == 1
    assert refused.stderr == f"september: another `september` runs on {installation.var}, pid {up.pid}\n"
    assert installation.admit()["status"] == "running"


def test_wrong_settings_are_refused_by_name_before_anything_is_started(install: Install) -> None:
    installation = install(ORCH_MASTER_KEY="x", ORCH_BOOT_TIMEOUT_S="soon")
    refused = installation.run("up")
    assert refused.returncode == 1
    assert sorted(line.partition(":")[0] for line in refused.stderr.splitlines()) == [
        "ORCH_BOOT_TIMEOUT_S",
        "ORCH_MASTER_KEY",
    ]
    assert not (installation.var / "postgres").exists()
    assert installation.run("up", "--backend", "vms").returncode == 2


@pytest.mark.parametrize("victim", ["services.provisioner", "services.admission", "bin/envoy"])
def test_a_part_that_dies_is_named_and_everything_ends(install: Install, victim: str) -> None:
    installation = install()
    up = installation.up("--lane", "grpc" if victim == "services.admission" else "fast")
    part(installation, victim).kill()
    assert up.wait(DEADLINE_S) == 1
    name = "gateway" if victim == "bin/envoy" else victim.removeprefix("services.")
    assert f"september: {name} was killed by SIGKILL; the end of {installation.var}/log/{name}.log:" in (
        installation.output.read_text()
    )
    # Without the Provisioner nobody ends engines; the next start takes them over.
    assert installation.names() <= ({"engine"} if victim == "services.provisioner" else set())


def test_a_database_that_dies_is_named_and_everything_ends(install: Install) -> None:
    installation = install()
    up = installation.up()
    postmaster = int((installation.var / "postgres" / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGQUIT)  # Means: at once.
    assert up.wait(DEADLINE_S) == 1
    said = installation.output.read_text()
    assert f"september: PostgreSQL has ended; the end of {installation.var}/postgres/log:" in said
    assert "received immediate shutdown request" in said
    assert installation.processes() == []


def test_a_part_that_can_not_start_is_named_with_what_it_said(install: Install) -> None:
    installation = install(
        ORCH_PROVISIONER_LISTEN="127.0.0.1:0", ORCH_ENGINE_BACKEND="docker", DOCKER_HOST="unix:///none"
    )
    refused = installation.run("up")
    assert refused.returncode == 1
    first, *lines = refused.stderr.splitlines()
    log = installation.var / "log" / "provisioner.log"
    assert first == f"september: provisioner ended with exit code 1; the end of {log}:"
    assert lines == [f"  {line}" for line in log.read_text().splitlines()]
    assert "Traceback" not in refused.stderr
    assert installation.processes() == []


def test_when_it_is_killed_its_parts_end_and_the_next_start_takes_over_the_rest(install: Install) -> None:
    installation = install()
    up = installation.up()
    before = installation.admit()
    up.kill()
    up.wait()
    eventually(lambda: installation.names() == {"postgres", "engine"}, "the parts end")

    up = installation.up()
    after = installation.admit()
    assert after["api_key"] == before["api_key"]
    assert execute(after, after["api_key"])[0] == 200
    up.terminate()
    assert up.wait(DEADLINE_S) == 0
    assert installation.processes() == []


@pytest.mark.parametrize("moment", ["postgres", "provisioner", "envoy"])
def test_a_signal_in_the_middle_of_the_start_leaves_nothing_running(install: Install, moment: str) -> None:
    installation = install()
    up = installation.begin()
    eventually(lambda: moment in installation.names(), f"{moment} is started")
    up.terminate()
    assert up.wait(DEADLINE_S) == 0, installation.output.read_text()
    assert installation.processes() == []


def test_on_a_terminal_ctrl_c_pressed_again_and_again_leaves_nothing_running(install: Install) -> None:
    installation = install()
    command = [sys.executable, "-c", TERMINAL, sys.executable, "-m", "services.cli", "up"]
    terminal_environment = {**installation.environment, "TERM": "xterm"}
    with (
        installation.output.open("wb") as output,
        subprocess.Popen(
            command, env=terminal_environment, stdin=subprocess.PIPE, stdout=output, bufsize=0
        ) as terminal,
    ):
        eventually((installation.var / "run" / "env").exists, "up is ready")
        installation.admit()

        def ended() -> bool:
            assert terminal.stdin is not None
            with suppress(BrokenPipeError):
                terminal.stdin.write(b"\x03")
            return terminal.poll() is not None

        eventually(ended, "it ends")
    assert terminal.returncode == 0
    assert installation.processes() == []
    assert "✓" in installation.output.read_text()


def test_a_given_database_is_used_and_left_running(install: Install, database_url: str) -> None:
    installation = install(ORCH_DATABASE_URL=database_url)
    up = installation.up()
    assert installation.announced()["DATABASE_URL"] == database_url
    assert installation.admit()["status"] == "running"
    assert not (installation.var / "postgres").exists()
    up.terminate()
    assert up.wait(DEADLINE_S) == 0
    with psycopg.connect(database_url) as connection:
        query = "SELECT user_id FROM engines WHERE user_id IS NOT NULL"
        assert connection.execute(query).fetchall() == [("ada",)]


def test_a_key_that_the_registry_does_not_know_is_replaced(install: Install) -> None:
    installation = install()
    up = installation.up()
    lost = installation.announced()["PLATFORM_KEY"]
    up.terminate()
    assert up.wait(DEADLINE_S) == 0

    (installation.var / "secrets" / "demo_process_platform_key").write_text(f"pk-sept-{'x' * 43}\n")
    installation.up()
    assert installation.announced()["PLATFORM_KEY"] not in (lost, f"pk-sept-{'x' * 43}")
    assert installation.admit()["status"] == "running"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_serves_over_tls_with_parts_that_talk_over_sockets(install: Install, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    installation = install(
        ORCH_GATEWAY_CERT_FILE=str(tmp_path / "public.pem"), ORCH_GATEWAY_KEY_FILE=str(tmp_path / "public.key")
    )
    sockets = installation.var.parent / "sockets"
    sockets.mkdir(0o700)
    for name in ("ADMISSION", "PROVISIONER"):
        installation.environment[f"ORCH_{name}_LISTEN"] = f"unix:{sockets}/{name.lower()}"
    installation.up("--lane", "grpc")
    shell = installation.announced()
    trusted = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    for url in (shell["REST_URL"], shell["ADMIN_URL"]):
        address = url.removeprefix("https://")
        connection = HTTPSConnection(address, timeout=DEADLINE_S, context=trusted)
        connection.request("GET", "/engines", headers={"X-Admin-Key": shell["ADMIN_KEY"]})
        assert connection.getresponse().status == (200 if url == shell["ADMIN_URL"] else 401)
        connection.close()
    # Which asks Admission and the Provisioner.
    admitted = installation.run("admit", "ada", "--auto-provision")
    assert admitted.returncode == 0, admitted.stderr
    assert installation.run("product", "list").returncode == 0
