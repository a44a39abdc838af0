"""Pings keep quiet connections, and come no oftener than the other side allows."""

import asyncio
import re
import struct
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from september.provisioner.v1.provisioner_service_pb2 import WatchEngineRequest
from services.admission import provisioner_client
from services.cli import connection
from services.cli.connection import PLATFORM_KEY, PROVISIONER, Connection
from services.cli.gateway import GatewaySettings, render
from services.cli.var_directory import VarDirectory
from tests.chaos.clock import clock
from tests.e2e import http2
from tests.e2e.gateway_process import DEADLINE_S, running_gateway
from tests.harness import Clients, Platform, Service

IDLE_S = 30 * 60.0
ACK = 1
ENHANCE_YOUR_CALM = struct.pack(">I", 11)


def intervals_s() -> list[float]:
    """How often Admission, commands and the gateway ping, in seconds."""
    ours = [dict(module._OPTIONS)["grpc.keepalive_time_ms"] / 1000 for module in (provisioner_client, connection)]
    gateways = re.findall(r"connection_keepalive: \{interval: (\d+)s", render(GatewaySettings("a:1", "b:2", "c:3")))
    return [*ours, *map(float, gateways)]


async def test_a_server_lets_callers_ping_as_often_as_ours_do_but_not_all_the_time(platform: Platform) -> None:
    """Of time, only the server's own passes."""
    intervals = intervals_s()
    assert len(intervals) == 3
    with clock() as servers:
        passing = {**servers.environment, "FAKETIME_DONT_FAKE_MONOTONIC": "0"}
        reader, writer = await asyncio.open_connection("127.0.0.1", platform.provisioner(**passing).port)
        frames = http2.frames(reader)

        async def answered() -> tuple[int, bytes]:
            """What a ping is answered with: kind and payload."""
            writer.write(http2.frame(http2.PING, 0, 0, b"8 octets"))
            async for kind, flags, _, payload in frames:
                if kind == http2.GOAWAY or (kind == http2.PING and flags & ACK):
                    return kind, payload
            raise ConnectionError

        try:
            writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
            async with asyncio.timeout(DEADLINE_S):
                assert (await anext(frames))[0] == http2.SETTINGS
                writer.write(http2.frame(http2.SETTINGS, ACK, 0))
                for number in range(10):
                    servers.set(number * min(intervals) / 3600)
                    assert await answered() == (http2.PING, b"8 octets"), number
                while (answer := await answered())[0] == http2.PING:
                    pass
            assert answer[1][4:8] == ENHANCE_YOUR_CALM
        finally:
            writer.transport.abort()


def connections_to(*services: Service) -> set[tuple[object, object]]:
    """Both ends of every connection to these."""
    ports = {service.port for service in services}
    return {
        (one.laddr, one.raddr)
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_ESTABLISHED and one.raddr and one.raddr.port in ports
    }


@pytest.mark.long
async def test_after_half_an_hour_without_a_call_all_connections_are_still_there(
    platform: Platform, connect: Callable[..., Clients], tmp_path: Path
) -> None:
    provisioner = platform.provisioner()
    admission = platform.admission(provisioner)
    clients = connect(platform, provisioner)
    product = await clients.register()
    await clients.close()
    given = {PROVISIONER: provisioner.address, PLATFORM_KEY: product.key}
    key = [("x-platform-key", product.key)]
    async with (
        running_gateway(tmp_path, admission.address, provisioner.address) as gateway,
        Connection(given, VarDirectory(tmp_path)).provisioner() as commands,
    ):

        async def admitted(user_id: str) -> bool:
            answer = await gateway.rest("POST", f"/engines/{user_id}/admit", b'{"auto_provision":true}', key)
            # By the Provisioner, to which the gateway is connected, too.
            known = await gateway.rest("GET", f"/engines/{user_id}/history", headers=key)
            return answer.json()["admitted"] and known.status == 200

        assert await admitted("u1")
        watch = commands.WatchEngine(WatchEngineRequest(user_id="u1"), metadata=product.metadata)
        assert await watch.read()
        before = connections_to(provisioner, admission)
        # Of the gateway to both, of Admission, and of the command.
        assert len(before) >= 4
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(watch.read())), IDLE_S)
        assert await admitted("u2")
        assert before <= connections_to(provisioner, admission)
        statistics = await gateway.admin_page("/stats?filter=upstream_cx_destroy_remote")
        assert statistics.count(b"upstream_cx_destroy_remote: 0\n") == 2
        assert not watch.done()
        watch.cancel()
