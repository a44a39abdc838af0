"""`september fleet`: many engines at once."""

import typer
from google.protobuf.message import Message

from september.provisioner.v1.fleet_service_pb2 import GetFleetMetricsRequest, GetFleetStatusRequest
from services.cli.command import command
from services.cli.connection import Connection
from services.cli.output import Output

app = typer.Typer(
    help="All engines together: a product's own, or with the admin key everybody's.", no_args_is_help=True
)


@command(app)
async def status(connection: Connection, output: Output) -> None:
    """Count engines by status."""
    async with connection.fleet() as fleet:
        answer = await fleet.GetFleetStatus(GetFleetStatusRequest(), metadata=connection.widest_key())
    output.record(answer, *_shown(answer))


@command(app)
async def metrics(connection: Connection, output: Output) -> None:
    """Show what happened in the past hour."""
    async with connection.fleet() as fleet:
        answer = await fleet.GetFleetMetrics(GetFleetMetricsRequest(), metadata=connection.widest_key())
    output.record(answer, *_shown(answer))


def _shown(answer: Message) -> list[str]:
    """The fields that whoever asked may see."""
    return [one.name for one in answer.DESCRIPTOR.fields if not one.has_presence or answer.HasField(one.name)]
