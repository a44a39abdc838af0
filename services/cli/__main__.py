"""`september`: the platform's commands."""

import sys

import typer

from services.cli import admit, audit, backup, db, engine, fleet, gateway_alone, keys, product, up
from services.cli.command import EXIT_CODES
from services.cli.failure import Failure
from services.shared import log
from services.shared.errors import ServiceError

_HELP = """\
Private, single-tenant engines for the users of products.

Addresses and keys come from options, else from the environment, else, if these name no address, from the platform that
runs on this machine (ORCH_VAR_DIR/run/env). Lists are tables on a terminal and lines of fields between tabs elsewhere.
"""

app = typer.Typer(
    help=_HELP,
    epilog="\b\nExit codes:\n" + "\n".join(f"{code:>5}  {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("gateway")(gateway_alone.run)
app.add_typer(db.app, name="db")
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.add_typer(keys.app, name="keys")
app.add_typer(product.app, name="product")
app.add_typer(engine.app, name="engine")
app.add_typer(admit.app)
app.add_typer(fleet.app, name="fleet")
app.add_typer(audit.app)


def main() -> None:
    # What the services' own code logs below is said again, better, by the command's error.
    log.configure("september", "CRITICAL")
    try:
        app()
    except (Failure, ServiceError, OSError) as error:
        sys.exit(f"september: {error}")


if __name__ == "__main__":
    main()
