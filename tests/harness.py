"""The platform as real processes, for tests: PostgreSQL, Provisioners, Admissions, on free ports."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import psutil
import psycopg
from cryptography.fernet import Fernet
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1.fleet_service_pb2_grpc import FleetServiceStub
from september.provisioner.v1.product_service_pb2_grpc import ProductServiceStub
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 30.0


def eventually(condition: Any, what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The condition's first true value; polls, because what is waited for happens in other processes."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


def ports_from(first: int) -> dict[str, str]:
    """As many of a thousand as are no other test process's.

    If an engine's port is taken just as it starts, and an engine of others answers there, that passes for its own.
    """
    share = 1000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    low = first + share * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return {"ORCH_PORT_MIN": f"{low}", "ORCH_PORT_MAX": f"{low + share - 1}"}


class Service:
    """One service's process, started and serving."""

    def __init__(self, name: str, environment: dict[str, str], log_file: Path) -> None:
        self.log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{name}"],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen' / 'python'}", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.port: int = eventually(self._port, f"{name} serves")
        except BaseException:
            self.kill()
            raise
        self.address = f"127.0.0.1:{self.port}"

    def _port(self) -> int | None:
        assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log_file.read_text()}"
        return next((event["port"] for event in self.events() if event["event"] == "serving"), None)

    def events(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        events = []
        for line in self.log_file.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                events.append(json.loads(line))
        return events

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stall(self) -> None:
        """Stops it with SIGSTOP, at a moment when it holds no lock on an engine's directory.

        Whoever is stopped with one keeps it from all others of the host. Only the process backend has such locks.
        """
        eventually(self._stalled, "it holds no lock")

    def _stalled(self) -> bool:
        self.process.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED, "it is stopped")
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if not any(kind == "FLOCK" and pid == str(self.process.pid) for _, kind, _, _, pid, *_ in locks):
            return True
        self.process.send_signal(signal.SIGCONT)
        return False

    def terminate(self) -> int:
        """Ends it orderly; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


@dataclass
class Product:
    """A registered product."""

    product_id: str
    slug: str
    key: str = field(repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-platform-key", self.key),)


class Platform:
    """An installation of its own: database, secrets, data directory, and the processes started on it."""

    def __init__(self, database_url: str, directory: Path, **settings: str) -> None:
        self.database_url = database_url
        self.directory = directory
        self.admin_key = secrets.token_urlsafe(24)
        self.services: list[Service] = []
        self._numbers = count()
        self.environment = {
            "ORCH_DATABASE_URL": database_url,
            "ORCH_MASTER_KEY": Fernet.generate_key().decode(),
            "ORCH_ADMIN_KEY": self.admin_key,
            "ORCH_VAR_DIR": str(directory / "var"),
            "ORCH_ENGINE_BACKEND": "process",
            "ORCH_DRAIN_S": "0",
            "ORCH_PROVISIONER_LISTEN": "127.0.0.1:0",
            "ORCH_ADMISSION_LISTEN": "127.0.0.1:0",
            **settings,
        }

    def start(self, name: str, **settings: str) -> Service:
        """Starts a service, with `settings` over the platform's own."""
        # Some are started side by side.
        log_file = self.directory / f"{name}-{next(self._numbers)}.log"
        service = Service(name, {**self.environment, **settings}, log_file)
        self.services.append(service)
        return service

    def provisioner(self, **settings: str) -> Service:
        return self.start("provisioner", **settings)

    def admission(self, provisioner: Service, **settings: str) -> Service:
        return self.start("admission", ORCH_PROVISIONER_ADDR=provisioner.address, **settings)

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode(), parameters)
            return cursor.fetchall() if cursor.description is not None else []

    def installation(self) -> str:
        return str(self.query("SELECT installation_id FROM installation")[0][0])

    def engine_processes(self) -> list[psutil.Process]:
        """Every process of an engine of this installation."""
        found = []
        installation = self.installation()
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                environment = process.environ()
                leader = os.getsid(process.pid) == process.pid and process.status() != psutil.STATUS_ZOMBIE
                if leader and environment.get("SEPTEMBER_INSTALLATION") == installation:
                    found.append(process)
        return found

    def counts(self) -> dict[str, int]:
        """The oracle: rows, ports, processes and data directories, which must be equally many."""
        directories = self.directory / "var" / "engines"
        return {
            "rows": self.query("SELECT count(*) FROM engines")[0][0],
            "ports": self.query("SELECT count(*) FROM port_leases")[0][0],
            "processes": len(self.engine_processes()),
            "volumes": len([d for d in directories.iterdir() if d.is_dir()]) if directories.exists() else 0,
        }

    def counts_at_rest(self) -> dict[str, int]:
        """`counts`, taken while no operation was open and none began: in the warm pool one may at any moment."""
        begun = "SELECT count(*) FROM operations"

        def counted() -> dict[str, int] | None:
            before = self.query(begun)
            if self.open_operations():
                return None
            counts = self.counts()
            return counts if self.query(begun) == before else None

        counts: dict[str, int] = eventually(counted, "every operation has ended")
        return counts

    def volume(self, engine_id: UUID) -> Path:
        """Where the engine's data is."""
        return self.directory / "var" / "engines" / str(engine_id) / "data"

    def replicas_know(self) -> None:
        """Waits until every Admission knows what the registry holds now."""
        [(now,)] = self.query("SELECT clock_timestamp()")
        unknowing = "SELECT 1 FROM admission_replicas WHERE died_at IS NULL AND flushed_at <= %s"
        eventually(lambda: not self.query(unknowing, now), "every replica has read the feed")

    def lose_notifications(self) -> None:
        """From now on no notification of a change comes through."""
        self.query(
            "CREATE OR REPLACE FUNCTION note_change(p_product_id uuid, p_user_id text) RETURNS void LANGUAGE sql AS"
            " 'INSERT INTO changes (product_id, user_id) VALUES (p_product_id, p_user_id)'"
        )

    def open_operations(self) -> int:
        return int(self.query("SELECT count(*) FROM operations WHERE finished_at IS NULL")[0][0])

    def close(self) -> None:
        """Ends the services and every engine."""
        for service in self.services:
            if service.process.poll() is None:
                service.process.send_signal(signal.SIGTERM)
        for service in self.services:
            try:
                service.process.wait(20)
            except subprocess.TimeoutExpired:
                service.kill()
        # A service that never came up may have left no schema, and so no engine.
        with suppress(psycopg.errors.UndefinedTable):
            for process in self.engine_processes():
                with suppress(psutil.Error):
                    process.kill()


def new_database(base_url: str) -> str:
    """Makes an empty database on the server; returns its URL."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(base_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return base_url.replace("/postgres?", f"/{name}?")


class Clients:
    """Stubs of the services over real channels."""

    def __init__(self, platform: Platform, provisioner: str, *admissions: str) -> None:
        self._platform = platform
        self._channels = [grpc.aio.insecure_channel(address) for address in (provisioner, *admissions)]
        self.products = ProductServiceStub(self._channels[0])
        self.provisioner = ProvisionerServiceStub(self._channels[0])
        self.fleet = FleetServiceStub(self._channels[0])
        self.admissions = [AdmissionServiceStub(channel) for channel in self._channels[1:]]

    @property
    def admission(self) -> AdmissionServiceStub:
        return self.admissions[0]

    async def register(self, **policy: Any) -> Product:
        """Registers a product with a slug of its own; at most 100 engines unless said otherwise."""
        slug = f"p{uuid4().hex[:20]}"
        fields = ParseDict({"max_engines": 100, **policy}, Struct())
        response = await self.products.RegisterProduct(
            product_pb.RegisterProductRequest(slug=slug, policy=fields), metadata=self.admin
        )
        return Product(response.product_id, slug, response.platform_api_key)

    @property
    def admin(self) -> tuple[tuple[str, str], ...]:
        return (("x-admin-key", self._platform.admin_key),)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def reason(error: grpc.aio.AioRpcError) -> str:
    """The error's code in the error table."""
    info = ErrorInfo()
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    status.details[0].Unpack(info)
    assert info.domain == "platform.september"
    return info.reason


def retry_after_s(error: grpc.aio.AioRpcError) -> float:
    """When the error says to come back."""
    retry = RetryInfo()
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    assert status.details[1].Unpack(retry)
    return retry.retry_delay.ToNanoseconds() / 1e9


@contextmanager
def running_platform(database_url: str, directory: Path, **settings: str) -> Iterator[Platform]:
    platform = Platform(database_url, directory, **settings)
    try:
        yield platform
    finally:
        platform.close()
