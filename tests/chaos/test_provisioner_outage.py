"""The Provisioner gone or hung: running engines are admitted, and new users are told."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from services.admission import provisioner_client
from services.admission.provisioner_client import ProvisionerClient
from services.shared.errors import Unavailable
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


async def test_while_none_is_connected_all_callers_look_out_together_and_are_told_within_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = ProvisionerClient(f"127.0.0.1:{nobody.getsockname()[1]}", boot_timeout_s=60)
        await client.open()
        looks, get_state = count(), client._channel.get_state
        monkeypatch.setattr(client._channel, "get_state", lambda: (next(looks), get_state())[1])

        async def told_after_s(timeout_s: float | None) -> float:
            begun = time.monotonic()
            with pytest.raises(Unavailable):
                await client.ensure("key", "u", auto_provision=True, auto_wake=False, timeout_s=timeout_s)
            return time.monotonic() - begun

        impatient, *_ = await asyncio.gather(told_after_s(0.2), *(told_after_s(None) for _ in range(200)))
        assert impatient < provisioner_client._CHANGEOVER_S
        assert next(looks) < 2 * provisioner_client._CHANGEOVER_S / provisioner_client._POLL_S
        # Nobody waits again for what was waited for in vain.
        assert await told_after_s(None) < provisioner_client._CHANGEOVER_S
        await client.close()


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
