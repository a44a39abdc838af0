"""A Provisioner that ends, or stops, under engines and operations: others go on with them."""

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.harness import Clients, Platform, eventually

pytestmark = pytest.mark.early

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
