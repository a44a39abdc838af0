"""Admission by several processes on one port, and what is known of those that died."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import grpc
import psutil
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.admission import replica
from tests.harness import ROOT, Clients, Platform, Service, eventually
from tests.integration.test_life_cycle import User
from tests.integration.test_sleep import QUICK

Connect = Callable[..., Clients]


def workers_of(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


async def health(address: str, connections: int) -> None:
    """Asks over so many connections, which the kernel spreads over the workers."""
    for _ in range(connections):
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            response = await AdmissionServiceStub(channel).CheckHealth(
                pb.CheckHealthRequest(), wait_for_ready=True, timeout=15
            )
            assert response.status == "ok"


async def test_workers_share_a_port_and_each_that_dies_is_replaced(platform: Platform) -> None:
    admission = platform.admission(platform.provisioner(), ORCH_ADMISSION_WORKERS="3")
    workers = workers_of(admission)
    assert len(workers) == 3
    for worker in workers:
        assert {c.laddr.port for c in worker.net_connections() if c.status == "LISTEN"} == {admission.port}
    await health(admission.address, 20)
    alive = "SELECT count(*) FROM admission_replicas WHERE died_at IS NULL"
    assert platform.query(alive) == [(3,)]
    for worker in workers[:2]:
        worker.kill()
    await asyncio.to_thread(
        eventually,
        lambda: len([e for e in admission.events() if e["event"] == "worker_serving"]) == 5,
        "those that died are replaced",
    )
    assert len(workers_of(admission)) == 3
    await health(admission.address, 20)
    assert platform.query(alive) == [(3,)]
    assert admission.terminate() == 0
    assert not [worker for worker in workers if worker.is_running()]
    assert platform.query(alive) == [(0,)]


def test_workers_end_with_their_parent(platform: Platform) -> None:
    admission = platform.admission(platform.provisioner(), ORCH_ADMISSION_WORKERS="2")
    workers = workers_of(admission)
    admission.kill()
    _, left = psutil.wait_procs(workers, 10)
    assert left == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_somebody_has_is_not_shared(platform: Platform, workers: str) -> None:
    provisioner = platform.provisioner()
    with socket.socket() as other:
        # Even one that would share it.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AssertionError, match=f"{address} is taken"):
            platform.admission(provisioner, ORCH_ADMISSION_WORKERS=workers, ORCH_ADMISSION_LISTEN=address)


def test_workers_that_cannot_start_end_the_service(platform: Platform) -> None:
    provisioner = platform.provisioner()
    platform.query("ALTER TABLE admission_replicas RENAME TO gone")
    with pytest.raises(AssertionError, match="a worker ended before it served"):
        platform.admission(provisioner, ORCH_ADMISSION_WORKERS="2")


@pytest.mark.parametrize("workers", ["0", "65", "two"])
def test_other_numbers_of_workers_are_refused_by_name(platform: Platform, workers: str) -> None:
    with pytest.raises(AssertionError, match="ORCH_ADMISSION_WORKERS: "):
        platform.start("admission", ORCH_ADMISSION_WORKERS=workers)


async def test_sleep_does_not_wait_for_a_replica_that_is_known_to_have_died(
    platform: Platform, connect: Connect
) -> None:
    """It would for as long as that may go on without the registry; but what it admitted last is not known."""
    provisioner = platform.provisioner(**QUICK)
    first = platform.admission(provisioner)
    clients = connect(platform, provisioner, first)
    user = User(clients, await clients.register(idle_sleep_after_s=3))
    engine = (await user.admit(auto_provision=True)).engine
    first.kill()
    platform.admission(provisioner)
    [(died_at,)] = platform.query("SELECT max(died_at) FROM admission_replicas")
    ended = "SELECT finished_at FROM operations WHERE engine_id = %s AND kind = 'sleep' AND outcome = 'succeeded'"
    [(asleep,)] = await asyncio.to_thread(
        eventually, lambda: platform.query(ended, UUID(engine.engine_id)), "the engine sleeps"
    )
    assert (asleep - died_at).total_seconds() > 3


def test_a_replica_is_dead_once_its_process_has_ended_and_not_before(tmp_path: Path) -> None:
    script = (
        "import sys, uuid, pathlib; from services.admission import replica\n"
        "with replica.alive(pathlib.Path(sys.argv[1]), uuid.UUID(sys.argv[2])):\n"
        "    print('alive', flush=True); sys.stdin.read()"
    )
    ids = [uuid4() for _ in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "replicas", str(replica_id)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for replica_id in ids
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"alive\n"
    assert replica.dead(tmp_path / "replicas") == []
    processes[0].kill()
    processes[1].communicate()
    processes[0].wait()
    assert set(replica.dead(tmp_path / "replicas")) == set(ids[:2])
    replica.forget(tmp_path / "replicas", ids[0])
    assert replica.dead(tmp_path / "replicas") == [ids[1]]
    processes[2].communicate()
    processes[0].communicate()
