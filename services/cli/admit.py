"""`september admit`: what a product asks on every request."""

from typing import Annotated

import typer

from september.admission.v1.admission_service_pb2 import AdmitRequest
from september.engine.v1.denial_pb2 import Denial
from services.cli.command import DENIED, User, command, whole_number
from services.cli.connection import Connection
from services.cli.output import Output, enum_name
from services.cli.sightings import progress

app = typer.Typer()

_REMEDIES = {
    Denial.engine_not_found: "--auto-provision makes an engine",
    Denial.engine_sleeping: "--auto-wake wakes a sleeping engine, `september engine start` starts a stopped one",
    Denial.engine_unhealthy: "`september engine history` tells why",
}


@command(app)
async def admit(
    connection: Connection,
    output: Output,
    user: User,
    auto_provision: Annotated[
        bool, typer.Option("--auto-provision", help="Make the engine if the user has none.")
    ] = False,
    auto_wake: Annotated[bool, typer.Option("--auto-wake", help="Wake the engine if it sleeps.")] = False,
    keep_awake_s: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Seconds in which the engine is not put to sleep.")
    ] = 0,
) -> None:
    """Admit a user to their engine, and show its URL and key.

    A denial is told on standard error, and ends with exit code 3.
    """
    request = AdmitRequest(user_id=user, auto_provision=auto_provision, auto_wake=auto_wake, keep_awake_s=keep_awake_s)
    async with progress(connection, output, user), connection.admission() as admission:
        answer = await admission.Admit(request, metadata=connection.platform_key())
    if answer.admitted or output.as_json:
        output.record(answer, "engine.url", "engine.api_key")
    else:
        reason = enum_name(Denial.Reason.DESCRIPTOR, answer.reason)
        typer.echo("; ".join(filter(None, [f"not admitted: {reason}", _REMEDIES.get(answer.reason)])), err=True)
    if not answer.admitted:
        raise typer.Exit(DENIED)
