"""`september engine`: the engines of a product's users."""

import sys
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Annotated, Any

import typer

from september.admission.v1.admission_service_pb2 import GetEngineRequest
from september.engine.v1.engine_pb2 import Engine
from september.provisioner.v1 import provisioner_service_pb2 as pb
from september.provisioner.v1.fleet_service_pb2 import GetEngineHistoryRequest, ListEnginesRequest
from services.cli.command import User, command
from services.cli.connection import Connection
from services.cli.output import Output
from services.cli.paging import All, Limit, listed, note_more
from services.cli.sightings import progress, sightings

app = typer.Typer(help="The engines of a product's users.", no_args_is_help=True)

EVENT = ("at", "action", "outcome", "actor", "user_id", "duration_ms", "count", "error_code", "detail")


def _statuses() -> list[str]:
    return [name for name in Engine.Status.keys() if name != "unspecified"]  # noqa: SIM118 - it is no dict


@command(app, "list")
async def list_(
    connection: Connection,
    output: Output,
    status: Annotated[str, typer.Option(autocompletion=_statuses, help="Only engines with this status.")] = "",
    limit: Limit = 100,
    everything: All = False,
    all_products: Annotated[bool, typer.Option("--all-products", help="Those of all products, for operators.")] = False,
) -> None:
    """List engines, the oldest first."""
    async with connection.fleet() as fleet:
        key = connection.admin_key() if all_products else connection.platform_key()
        answer = await listed(
            fleet.ListEngines, ListEnginesRequest(status=status), key, limit=None if everything else limit
        )
    shown = ("user_id", "status", "url", "engine_version", "created_at", "last_health_at")
    output.table(answer, answer.engines, *shown, *(["product_id"] if all_products else []))
    note_more(output, answer)


@command(app)
async def get(connection: Connection, output: Output, user: User) -> None:
    """Show a user's engine, its key too."""
    async with connection.admission() as admission:
        answer = await admission.GetEngine(GetEngineRequest(user_id=user), metadata=connection.platform_key())
    output.record(answer.engine)


@command(app, idempotency_key=True)
async def provision(
    connection: Connection,
    output: Output,
    user: User,
    engine_version: Annotated[str, typer.Option(metavar="IMAGE", help="Image to run, if not the platform's own.")] = "",
) -> None:
    """Make the engine of a user who has none, and show its key."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.ProvisionEngine(
            pb.ProvisionEngineRequest(user_id=user, engine_version=engine_version), metadata=connection.platform_key()
        )
    output.record(answer)


@command(app, idempotency_key=True)
async def start(connection: Connection, output: Output, user: User) -> None:
    """Start a stopped, sleeping or failed engine."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.StartEngine(pb.StartEngineRequest(user_id=user), metadata=connection.platform_key())
    output.record(answer)


@command(app, idempotency_key=True)
async def stop(connection: Connection, output: Output, user: User) -> None:
    """Stop an engine; its data is kept."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.StopEngine(pb.StopEngineRequest(user_id=user), metadata=connection.platform_key())
    output.record(answer)


@command(app, idempotency_key=True)
async def sleep(connection: Connection, output: Output, user: User) -> None:
    """Freeze a running engine, unless it is at work."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.SleepEngine(pb.SleepEngineRequest(user_id=user), metadata=connection.platform_key())
    output.record(answer)


@command(app, idempotency_key=True)
async def wake(connection: Connection, output: Output, user: User) -> None:
    """Wake a sleeping engine."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.WakeEngine(pb.WakeEngineRequest(user_id=user), metadata=connection.platform_key())
    output.record(answer)


@command(app, idempotency_key=True)
def destroy(
    connection: Connection,
    output: Output,
    user: User,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Coroutine[Any, Any, None]:
    """Remove an engine with its data."""
    # Asked outside of the event loop, in which Ctrl-C would not end the question.
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody can be asked, so --yes is needed")
        typer.confirm(f"Remove the engine of {user} with its data?", abort=True, err=True)
    return _destroy(connection, output, user)


async def _destroy(connection: Connection, output: Output, user: str) -> None:
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.DestroyEngine(
            pb.DestroyEngineRequest(user_id=user), metadata=connection.platform_key()
        )
    output.record(answer)


@command(app, idempotency_key=True)
async def rotate_key(connection: Connection, output: Output, user: User) -> None:
    """Give a running engine a new key, and show it; the old one goes on working for a minute."""
    async with progress(connection, output, user), connection.provisioner() as provisioner:
        answer = await provisioner.RotateEngineKey(
            pb.RotateEngineKeyRequest(user_id=user), metadata=connection.platform_key()
        )
    output.record(answer)


@command(app)
async def history(connection: Connection, output: Output, user: User, limit: Limit = 100) -> None:
    """Tell what happened to an engine and why, the latest first."""
    async with connection.fleet() as fleet:
        answer = await fleet.GetEngineHistory(
            GetEngineHistoryRequest(user_id=user, limit=limit), metadata=connection.platform_key()
        )
    output.record(answer, "status", "since", "summary", "last_admit_at", "keep_awake_until")
    if not output.as_json:
        output.rows(answer.events, *EVENT)


@command(app)
async def watch(connection: Connection, output: Output, user: User) -> None:
    """Show an engine's state and every change of it, until it is gone or Ctrl-C.

    The Provisioner may be restarted meanwhile.
    """
    async with aclosing(sightings(connection, user)) as seen:
        async for sighting in seen:
            output.event(sighting, "at", "status", "operation", "step")
