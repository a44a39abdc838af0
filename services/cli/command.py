"""How a command of the platform is made: the options that all have, and how all end."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from september.errors.v1 import errors_pb2
from services.cli import connection
from services.cli.connection import Connection
from services.cli.output import Output
from services.cli.var_directory import VarDirectory
from services.shared.errors import ServiceError
from services.shared.settings import IdentitySettings, StorageSettings, load

EXIT_CODES = {
    0: "done",
    1: "another error",
    2: "wrong arguments",
    3: "not admitted (admit)",
    4: "not found",
    5: "conflict: exists already, not running, running already",
    6: "over the rate limit or the quota",
    7: "unavailable, or not in time",
    8: "the key or the policy does not allow it",
    130: "Ctrl-C",
}
DENIED = 3
_OF_HTTP = {400: 2, 401: 8, 403: 8, 404: 4, 409: 5, 429: 6, 503: 7, 504: 7}
_HINTS = {
    "INVALID_PLATFORM_KEY": "--platform-key or PLATFORM_KEY gives one",
    "INVALID_ADMIN_KEY": "--admin-key or ADMIN_KEY gives it",
    "ENGINE_NOT_FOUND": "`september engine list` shows all",
    "PRODUCT_NOT_FOUND": "`september product list` shows all",
    "QUOTA_EXCEEDED": "`september product policy` shows and changes max_engines",
    "BOOT_TIMEOUT": "`september engine history` tells more",
}

P = ParamSpec("P")
Run = Callable[Concatenate[Connection, Output, P], Coroutine[Any, Any, None]]
User = Annotated[str, typer.Argument(metavar="USER", help="The product's own id of the user.")]


_CONNECTION = {
    connection.ADMISSION: typer.Option(
        "--admission", envvar=connection.ADMISSION, metavar="HOST:PORT", help="Address of Admission."
    ),
    connection.PROVISIONER: typer.Option(
        "--provisioner", envvar=connection.PROVISIONER, metavar="HOST:PORT", help="Address of the Provisioner."
    ),
    connection.PLATFORM_KEY: typer.Option(
        "--platform-key", envvar=connection.PLATFORM_KEY, metavar="KEY", help="Key of the product."
    ),
    connection.ADMIN_KEY: typer.Option(
        "--admin-key", envvar=connection.ADMIN_KEY, metavar="KEY", help="Key of the operators."
    ),
}
COMMON = [
    inspect.Parameter(
        variable.lower(), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
    for variable, option in _CONNECTION.items()
] + [
    inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")],
    )
]


_IDEMPOTENCY_KEY = inspect.Parameter(
    "idempotency_key",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Of calls with the same key only the first has an effect, for 24 hours."),
    ],
)


def command(app: typer.Typer, name: str | None = None, *, idempotency_key: bool = False) -> Callable[[Run[P]], Run[P]]:
    """Makes a command of a function that gets a connection, an output and the command's arguments.

    Args:
        app: the group.
        name: of the command, if it is not the function's.
        idempotency_key: whether it may be called with one, for commands that change something.
    """

    def register(run: Run[P]) -> Run[P]:
        def call(**arguments: Any) -> None:
            output = Output(as_json=arguments.pop("as_json"))
            values = {variable: arguments.pop(variable.lower()) for variable in _CONNECTION}
            given = {variable: value for variable, value in values.items() if value is not None}
            try:
                identity = load(IdentitySettings).identity()
                var = VarDirectory(load(StorageSettings).var_dir)
                known = Connection(given, var, identity, arguments.pop("idempotency_key", None))
                asyncio.run(run(known, output, **arguments))  # type: ignore[call-arg]
            except ServiceError as error:
                output.error(error, _HINTS.get(error.code))
                raise typer.Exit(exit_code(error.code)) from error
            except UnicodeEncodeError as error:
                wrong = error.object[error.start : error.end]
                raise typer.BadParameter(f"{wrong!r} can't be written in {error.encoding}") from error

        own = [*inspect.signature(run).parameters.values()][2:]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [_IDEMPOTENCY_KEY, *COMMON] if idempotency_key else COMMON
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = run.__doc__
        app.command(name or run.__name__.replace("_", "-"))(call)
        return run

    return register


def whole_number(text: str) -> int:
    """Reads a number that fits the protos' fields; whether it makes sense there is the platform's to say."""
    with suppress(ValueError):
        if -(2**31) <= int(text) < 2**31:
            return int(text)
    raise typer.BadParameter(f"{text!r} is not a whole number of 32 bits")


def exit_code(code: str) -> int:
    """The exit code for an error of the table; 1 for one that is not in it."""
    value = errors_pb2.ErrorCode.DESCRIPTOR.values_by_name.get(f"ERROR_CODE_{code}")
    return _OF_HTTP.get(value.GetOptions().Extensions[errors_pb2.mapping].http_status, 1) if value else 1
