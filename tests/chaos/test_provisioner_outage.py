"""The Provisioner gone or hung: running engines are admitted, and new users are told."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from tests.chaos.load import admit
from tests.chaos.outage import AT_ONCE_S, Callers, during
from tests.harness import Clients, Platform, Service, retry_after_s

Connect = Callable[..., Clients]

# A ping that is not answered, the gateway's, and some for a busy machine.
NOTICED_S = 30.0


@pytest.fixture
async def callers(platform: Platform, connect: Connect) -> Callers:
    provisioner = platform.provisioner()
    admission = platform.admission(provisioner)
    clients = connect(platform, provisioner, admission)
    callers = Callers(platform, clients, await clients.register(), [clients.admission])
    await callers.open()
    return callers


async def test_without_a_provisioner_running_engines_are_admitted_and_a_new_user_is_told_at_once(
    callers: Callers, platform: Platform
) -> None:
    provisioner = platform.services[0]
    async with callers.load(50) as running:
        provisioner.kill()
        for n in range(5):
            answer = await admit(callers.stubs[0], callers.product, f"new-{n}", auto_provision=True)
            assert (answer.outcome, answer.took_s < AT_ONCE_S) == ("UNAVAILABLE", True)
        request = pb.AdmitRequest(user_id="new", auto_provision=True)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await callers.stubs[0].Admit(request, metadata=callers.product.metadata)
        assert retry_after_s(error.value) == 1
        await asyncio.to_thread(platform.provisioner, ORCH_PROVISIONER_LISTEN=provisioner.address)
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}


@contextmanager
def stopped(service: Service) -> Iterator[None]:
    """Within the block it does nothing, and its connections stay open."""
    service.process.send_signal(signal.SIGSTOP)
    yield
    service.process.send_signal(signal.SIGCONT)


@pytest.mark.long
async def test_of_a_provisioner_that_hangs_a_new_user_is_told_in_time(callers: Callers, platform: Platform) -> None:
    async with callers.load(50) as running:
        async with during(stopped(platform.services[0])):
            for user_id in ("new", "newer"):
                answer = await admit(
                    callers.stubs[0], callers.product, user_id, auto_provision=True, timeout_s=2 * NOTICED_S
                )
                assert (answer.outcome, answer.took_s < NOTICED_S) == ("UNAVAILABLE", True)
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}
