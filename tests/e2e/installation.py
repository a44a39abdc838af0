"""`september` as its users run it, on a directory and ports of its own."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from services.shared import embedded_postgres
from tests.harness import ROOT, eventually, ports_from

# None that the kernel gives to whoever asks for any: `up` chooses a while before it listens, and other tests ask often.
_LISTENERS = cycle(range(*(int(port) for port in ports_from(18000).values())))


def post(url: str, body: object, **headers: str) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=30)
    connection.request("POST", parts.path, json.dumps(body), {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    status, content = response.status, response.read()
    connection.close()
    return status, content


class Installation:
    """A directory to run `september` on, with ports of its own."""

    def __init__(self, directory: Path, **settings: str) -> None:
        directory.mkdir()
        self.var = directory / "var"
        self.output = directory / "output"
        self.environment = {
            "PATH": os.environ["PATH"],
            "http_proxy": "http://127.0.0.1:9",  # Many hosts have one; it is not for what is on the host.
            "ORCH_VAR_DIR": str(self.var),
            "ORCH_GATEWAY_LISTEN": f"127.0.0.1:{next(_LISTENERS)}",
            "ORCH_GATEWAY_ADMIN_LISTEN": f"127.0.0.1:{next(_LISTENERS)}",
            "ORCH_ADMISSION_LISTEN": f"127.0.0.1:{next(_LISTENERS)}",
            "ORCH_PROVISIONER_LISTEN": f"127.0.0.1:{next(_LISTENERS)}",
            **ports_from(24000),
            **settings,
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def begin(self, *options: str) -> subprocess.Popen[bytes]:
        with self.output.open("wb") as output:
            up = subprocess.Popen(
                [sys.executable, "-m", "services.cli", "up", *options],
                cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(up)
        return up

    def up(self, *options: str) -> subprocess.Popen[bytes]:
        """Starts it, and returns when it is ready."""
        began = time.monotonic()
        announcement = self.var / "run" / "env"
        announcement.unlink(missing_ok=True)
        up = self.begin(*options)

        def ready() -> bool:
            assert up.poll() is None, self.output.read_text()
            return announcement.exists()

        eventually(ready, "up is ready")
        print(f"ready after {time.monotonic() - began:.1f} s")
        return up

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command that ends by itself."""
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *command],
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def announced(self) -> dict[str, str]:
        """What a shell knows that has read the environment file."""
        script = f'set -a; . "{self.var}/run/env"; exec env -0'
        read = subprocess.run(["sh", "-c", script], env={}, check=True, capture_output=True, text=True)
        return dict(line.split("=", 1) for line in read.stdout.split("\0") if line)

    def admit(self, user_id: str = "ada") -> dict[str, Any]:
        """The engine of a user, made if there is none."""
        shell = self.announced()
        url = f"{shell['REST_URL']}/engines/{user_id}/admit"
        status, body = post(url, {"auto_provision": True}, X_Platform_Key=shell["PLATFORM_KEY"])
        assert status == 200, body
        answer = json.loads(body)
        assert answer["admitted"] is True
        engine: dict[str, Any] = answer["engine"]
        return engine

    def processes(self) -> list[psutil.Process]:
        """All that run on the directory: services, Envoy, PostgreSQL, engines."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if str(self.var) in " ".join(process.cmdline()):
                return True
            # Not to be read of every process of another user.
            return process.cwd().startswith(str(self.var)) or process.environ().get("ORCH_VAR_DIR") == str(self.var)
        return False

    def names(self) -> set[str]:
        """What of the platform runs."""
        names = set()
        for process in self.processes():
            with suppress(psutil.Error):
                match = re.search(r"services\.(\w+)|\b(envoy|postgres)\b", " ".join(process.cmdline()))
                names |= {match[1] or match[2]} if match else set()
        return names

    def close(self) -> None:
        for up in self.started:
            if up.poll() is None:
                up.terminate()
                up.wait(60)
        for data_dir in self.var.glob("postgres*"):
            embedded_postgres.stop(data_dir)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()


@pytest.fixture
def install() -> Iterator[Callable[..., Installation]]:
    """Makes installations; ends what they have left."""
    made: list[Installation] = []

    # Not below pytest's own directory: it closes that to PostgreSQL's user whenever another run begins.
    with TemporaryDirectory(prefix="september-") as directory:

        def install(**settings: str) -> Installation:
            made.append(Installation(Path(directory) / str(len(made)), **settings))
            return made[-1]

        yield install
        for one in made:
            one.close()
