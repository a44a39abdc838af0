"""Pings keep quiet connections, and come no oftener than the other side allows."""

import asyncio
import re
import struct

from services.admission import provisioner_client
from services.cli import connection
from services.cli.gateway import GatewaySettings, render
from tests.chaos.clock import clock
from tests.e2e import http2
from tests.e2e.gateway_process import DEADLINE_S
from tests.harness import Platform

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
