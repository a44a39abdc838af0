"""`september`: the platform's commands."""

import sys

import typer

from services.cli import db, up
from services.cli.failure import Failure
from services.shared import log
from services.shared.errors import ServiceError

app = typer.Typer(
    help="Private, single-tenant engines for the users of products.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.add_typer(db.app, name="db")


def main() -> None:
    # What the services' own code logs below is said again, better, by the command's error.
    log.configure("september", "CRITICAL")
    try:
        app()
    except (Failure, ServiceError, OSError) as error:
        sys.exit(f"september: {error}")


if __name__ == "__main__":
    main()
