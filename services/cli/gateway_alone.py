"""`september gateway`: the gateway by itself, for where its services are processes of others."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli import gateway
from services.cli.drain import DRAIN_S, GRACE_S, drain
from services.cli.gateway import Lane
from services.cli.settings import GatewayAloneSettings
from services.cli.up import possible
from services.cli.var_directory import VarDirectory
from services.shared import children
from services.shared.settings import load


def run(
    lane: Annotated[Lane, typer.Option(help="Where Admission runs: inside of the gateway, or behind it.")] = Lane.GRPC,
) -> None:
    """Run the gateway alone, as ORCH_GATEWAY_…, ORCH_TLS_…, ORCH_ADMISSION_ADDR and ORCH_PROVISIONER_ADDR say.

    Told to end, it first lets its callers go elsewhere. In the fast lane it needs Admission's settings, too.
    """
    possible(lane, Console())
    given = load(GatewayAloneSettings)
    var = VarDirectory(given.var_dir)
    settings = gateway.settings_of(given, given.admission_addr if lane is Lane.GRPC else None, var)
    environment = gateway.environment(lane, os.environ)
    with var.exclusive():
        command, admin_file = gateway.prepare(settings, var)
        sys.exit(asyncio.run(_serve(command, environment, admin_file, given.drain_s)))


async def _serve(command: Sequence[str], environment: Mapping[str, str], admin_file: Path, drain_s: float) -> int:
    """Runs Envoy until it ends, or a signal comes; returns the exit code."""
    envoy = await children.start(*command, environment=environment, stdout=sys.stdout.buffer)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    ended, stop = asyncio.create_task(envoy.wait()), asyncio.create_task(told.wait())
    await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not ended.done():
        await asyncio.to_thread(drain, admin_file, DRAIN_S, drain_s)
        await children.stop(envoy, GRACE_S)
    return await ended
