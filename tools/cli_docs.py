"""Writes `docs/cli.md` from the commands themselves."""

import inspect
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import typer

from services.cli.__main__ import app
from services.cli.command import COMMON, EXIT_CODES

_DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_COMMON = {parameter.name for parameter in COMMON}

_JSON = """\
`--json` prints the answer as REST has it, without what is absent and with the names in alphabetical order: one
document, or an object a line for `watch`. Errors of the platform are then REST's envelope, on standard error. A key is
shown only where it is what the command is about. `september --install-completion` sets up completion in the shell.

USER is the product's own id of a user. PRODUCT is the slug or the UUID of a product.
"""


def render() -> str:
    """The document."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="september")
    codes = "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items())
    commands = list(_commands(root, context))
    common = next(options for command, _ in commands if (options := _options(command, context, _COMMON)))
    return "\n".join(
        [
            "<!-- Generated from services/cli by `make gen`; do not edit. -->\n# Command line\n",
            f"{inspect.cleandoc(root.help or '')}\n",
            _JSON,
            f"| exit code | when |\n|---|---|\n{codes}",
            f"Every command that calls the platform has these options:\n\n{common}",
            *(_section(command, name, context) for command, name in commands),
        ]
    )


def _commands(group: Any, context: typer.Context) -> Iterator[tuple[Any, str]]:
    """Every command that is no group, with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, typer.Context(command, parent=context, info_name=name))
        else:
            yield command, f"{context.command_path} {name}"


def _section(command: Any, name: str, context: typer.Context) -> str:
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    own = {p.name for p in command.params} - _COMMON - {"help"}
    parts = [f"## `{' '.join([name, *arguments])}`\n", f"{inspect.cleandoc(command.help)}\n"]
    return "\n".join(filter(None, [*parts, _options(command, context, own)]))


def _options(command: Any, context: typer.Context, names: Set[str]) -> str:
    options = [p for p in command.params if p.param_type_name == "option" and p.name in names]
    return "".join(f"- `{name}`: {text}\n" for name, text in (p.get_help_record(context) for p in options))


if __name__ == "__main__":
    _DOCUMENT.write_text(render())
