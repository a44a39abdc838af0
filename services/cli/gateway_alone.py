"""`september gateway`: the gateway by itself, for where its services are processes of others."""

import math
import os
from typing import Annotated

import typer
from rich.console import Console

from services.cli import gateway
from services.cli.gateway import Lane
from services.cli.settings import GatewayAloneSettings
from services.cli.up import possible
from services.cli.var_directory import VarDirectory
from services.shared.settings import load


def run(
    lane: Annotated[Lane, typer.Option(help="Where Admission runs: inside of the gateway, or behind it.")] = Lane.GRPC,
) -> None:
    """Run the gateway alone, as ORCH_GATEWAY_…, ORCH_TLS_…, ORCH_ADMISSION_ADDR and ORCH_PROVISIONER_ADDR say.

    This process becomes Envoy. In the fast lane it needs Admission's settings, too.
    """
    environment = dict(os.environ)
    if possible(lane, Console()) is Lane.FAST:
        environment |= gateway.lane_environment() or {}
    given = load(GatewayAloneSettings)
    var = VarDirectory(given.var_dir)
    settings = gateway.GatewaySettings(
        listen=given.gateway_listen,
        admission=given.admission_addr if lane is Lane.GRPC else None,
        provisioner=given.provisioner_addr,
        boot_timeout_s=math.ceil(given.boot_timeout_s),
        admin_port=given.gateway_metrics_port,
        collector=given.traces_addr,
        traces_percent=given.traces_percent,
        operators_listen=given.gateway_admin_listen,
        certificate=given.certificate(),
        identity=given.identity(),
        directory=var.run,
    )
    command, _ = gateway.prepare(settings, var)
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is wanted
