"""A Provisioner that ends, or stops, under engines and operations: others go on with them."""

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.shared.failpoints import VARIABLE
from tests.harness import Clients, Platform, eventually, reason
from tests.integration.test_life_cycle import User

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
LEASE = {"ORCH_OPERATION_LEASE_S": "1"}


async def settled(platform: Platform) -> None:
    await asyncio.to_thread(eventually, lambda: platform.open_operations() == 0, "every operation has ended")


def consistent(platform: Platform) -> None:
    counts = platform.counts()
    assert len(set(counts.values())) == 1, counts


async def test_engines_survive_a_killed_provisioner_and_are_adopted(platform: Platform, connect: Connect) -> None:
    first = platform.provisioner(**LEASE)
    clients = connect(platform, first)
    product = await clients.register()
    await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    before = [process.pid for process in platform.engine_processes()]
    first.kill()

    clients = connect(platform, platform.provisioner(**LEASE))
    assert [process.pid for process in platform.engine_processes()] == before
    assert platform.query("SELECT kind FROM operations") == [("provision",)]
    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="u1"), metadata=product.metadata)
    assert platform.counts() == {"rows": 0, "ports": 0, "processes": 0, "volumes": 0}


async def test_engines_that_died_with_the_platform_are_started_again(platform: Platform, connect: Connect) -> None:
    first = platform.provisioner(ORCH_STOP_ENGINES_ON_EXIT="true")
    clients = connect(platform, first)
    product = await clients.register()
    made = await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    assert first.terminate() == 0
    assert platform.engine_processes() == []

    second = platform.provisioner()
    clients = connect(platform, second, platform.admission(second))
    answer = await clients.admission.Admit(admission_pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert (answer.engine.engine_id, answer.engine.api_key) == (made.engine_id, made.api_key)
    consistent(platform)


async def test_another_provisioner_takes_over_what_a_stopped_one_has_begun(
    platform: Platform, connect: Connect
) -> None:
    first, second = platform.provisioner(**LEASE), platform.provisioner(**LEASE)
    clients = connect(platform, second)
    product = await clients.register(allowed_images=["tests.engines.*"])
    boots = [
        asyncio.ensure_future(
            clients.provisioner.ProvisionEngine(
                pb.ProvisionEngineRequest(user_id=f"u{i}", engine_version="tests.engines.slow_boot"),
                metadata=product.metadata,
            )
        )
        for i in range(6)
    ]
    await asyncio.to_thread(
        eventually,
        lambda: platform.query("SELECT 1 FROM operations HAVING count(DISTINCT owner) = 2"),
        "both work",
    )
    first.stall()
    await asyncio.gather(*boots)
    os.kill(first.process.pid, signal.SIGCONT)
    await settled(platform)
    consistent(platform)
    assert platform.counts()["rows"] == 6


async def test_an_operation_that_always_fails_as_nobody_foresaw_is_put_out_of_the_way(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    points = tmp_path / "failpoints"
    points.mkdir()
    provisioner = platform.provisioner(**LEASE, **{VARIABLE: str(points)})
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    poisoned, other = User(clients, product, "poisoned"), User(clients, product, "other")
    await poisoned.call("Provision")
    stopping: asyncio.Future[pb.StopEngineResponse] | None = None
    for attempt in range(1, 6):
        if attempt == 3:
            await other.call("Provision")
        (points / "stop.begun").symlink_to("raise")
        stopping = stopping or asyncio.ensure_future(poisoned.call("Stop"))
        # The pauses between attempts grow.
        platform.query("UPDATE operations SET not_before = clock_timestamp() WHERE finished_at IS NULL")
        failed = partial(
            platform.query, "SELECT 1 FROM operations WHERE kind = 'stop' AND attempts = %s AND owner IS NULL", attempt
        )
        await asyncio.to_thread(eventually, failed, f"attempt {attempt} has failed")
    assert stopping is not None
    [(operation_id,)] = platform.query("SELECT operation_id FROM operations WHERE quarantined_at IS NOT NULL")
    for waiting in (stopping, poisoned.call("Start")):
        with pytest.raises(grpc.aio.AioRpcError, match=str(operation_id)) as refused:
            await waiting
        assert reason(refused.value) == "INTERNAL"
    await other.call("Stop")
    await other.call("Start")
    await poisoned.call("Destroy")
    assert (await poisoned.admit(auto_provision=True)).admitted
    assert platform.open_operations() == 0
    consistent(platform)
