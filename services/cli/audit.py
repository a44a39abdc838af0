"""`september audit`: what happened."""

from typing import Annotated

import typer

from september.provisioner.v1.fleet_service_pb2 import ListAuditEventsRequest
from services.cli.command import command
from services.cli.connection import Connection
from services.cli.engine import EVENT
from services.cli.output import Output
from services.cli.paging import All, Limit, listed, note_more
from services.cli.product import find
from services.provisioner.domain.audit import AuditAction

app = typer.Typer()


def _actions() -> list[str]:
    return [*AuditAction]


@command(app)
async def audit(
    connection: Connection,
    output: Output,
    action: Annotated[str, typer.Option(autocompletion=_actions, help="Only events of this action.")] = "",
    user: Annotated[str, typer.Option(help="Only events of this user's engines; takes the product's key.")] = "",
    product: Annotated[
        str, typer.Option(help="Only events of this product, by slug or UUID; takes the admin key.")
    ] = "",
    limit: Limit = 100,
    everything: All = False,
) -> None:
    """List what happened, the latest first: to a product, or with the admin key to all."""
    if user and product:
        raise typer.BadParameter("--user and --product need different keys: give one of them")
    request = ListAuditEventsRequest(action=action, user_id=user)
    if product:
        request.product_id = await find(connection, product)
    async with connection.fleet() as fleet:
        key = connection.platform_key() if user else connection.admin_key() if product else connection.widest_key()
        answer = await listed(fleet.ListAuditEvents, request, key, limit=None if everything else limit)
    output.table(answer, answer.events, *EVENT, "product_id")
    note_more(output, answer)
