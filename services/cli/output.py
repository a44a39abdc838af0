"""What commands show: tables on a terminal, plain lines in a pipe, JSON for scripts."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.shared.errors import ServiceError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# What a word means, for the fields that hold one of a few.
_STYLED = {"status", "health", "outcome"}
_STYLES = {
    "running": "green",
    "ok": "green",
    "succeeded": "green",
    "provisioning": "yellow",
    "destroying": "yellow",
    "degraded": "yellow",
    "sleeping": "blue",
    "stopped": "dim",
    "failed": "red",
    "critical": "red",
}
# Of a field of an event, so that those of most lines are below each other.
_EVENT_WIDTH = 12
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Output:
    """Results go to standard output; notes and errors go to standard error.

    Args:
        as_json: every result is one JSON document, and an error is one in REST's envelope.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # Whether somebody watches.
        self.interactive = sys.stderr.isatty() and not as_json
        self._terminal = sys.stdout.isatty()

    def record(self, answer: Message, *fields: str) -> None:
        """Shows an answer, a field a line.

        Args:
            fields: which, with a path to those of inner messages; all if none is named.
        """
        if self.as_json:
            typer.echo(_json(answer))
            return
        named = [(_label(field), field) for field in fields or [field.name for field in answer.DESCRIPTOR.fields]]
        if not self._terminal:
            for label, field in named:
                typer.echo(f"{label}\t{_plain(answer, field)}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column()
        # What does not fit, a key for example, goes on in the next line.
        grid.add_column(overflow="fold")
        for label, field in named:
            grid.add_row(Text(label.replace("_", " "), "bold"), _rich(answer, field, absent="none"))
        _print(grid)

    def table(self, answer: Message, rows: Sequence[Message], *fields: str) -> None:
        """Shows an answer that is a list, an entry a line.

        Args:
            rows: the entries.
            fields: which, with a path to those of inner messages.
        """
        if self.as_json:
            typer.echo(_json(answer))
        else:
            self.rows(rows, *fields)

    def rows(self, rows: Sequence[Message], *fields: str) -> None:
        """Shows entries as `table` does, without JSON."""
        if not self._terminal:
            for row in rows:
                typer.echo("\t".join(_plain(row, field) for field in fields))
            return
        # A column that says nothing only takes the others' room.
        used = [field for field in fields if not rows or any(_plain(row, field) for row in rows)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for field in used:
            table.add_column(_label(field).removesuffix("_at").replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(_rich(row, field) for field in used))
        _print(table)

    def event(self, event: Message, *fields: str) -> None:
        """Shows one of many messages that come one by one: a line each, a JSON object each."""
        if self.as_json:
            typer.echo(_json(event, indent=None))
        elif self._terminal:
            _print(Text("  ").join(_moment(event, field) for field in fields))
        else:
            typer.echo("\t".join(_plain(event, field) for field in fields))

    def note(self, text: str) -> None:
        """Tells whoever watches."""
        if self.interactive:
            typer.echo(text, err=True)

    def error(self, error: ServiceError, hint: str | None) -> None:
        """Says why there is no result, in one line.

        Args:
            hint: what could be done about it, for people.
        """
        message = _CONTROL.sub(" ", error.message)
        if self.as_json:
            typer.echo(json.dumps({"error": {"code": error.code, "message": message}}), err=True)
            return
        if error.retry_after_s is not None:
            hint = f"try again in {math.ceil(error.retry_after_s)} s"
        typer.echo("; ".join(filter(None, [f"{error.code}: {message}", hint])), err=True)


def relative(at: datetime, now: datetime) -> str:
    """A time as people say it: `3 min ago`, `in 2 h`."""
    seconds = round((now - at).total_seconds())
    for size, unit in _UNITS:
        if abs(seconds) >= size:
            amount = f"{abs(seconds) // size} {unit}"
            return f"{amount} ago" if seconds > 0 else f"in {amount}"
    return "now"


def enum_name(enum: Any, number: int) -> str:
    """The name of a value of an enum; the number of one that only later versions know.

    Args:
        enum: its descriptor.
    """
    value = enum.values_by_number.get(number)
    return str(number) if value is None else str(value.name)


def _json(message: Message, indent: int | None = 2) -> str:
    # Sorted: protobuf's order depends on which fields are empty.
    return MessageToJson(
        message,
        indent=indent,
        sort_keys=True,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def _label(path: str) -> str:
    return path.rpartition(".")[2]


def _find(message: Message, path: str) -> tuple[Any, Any]:
    """A field and its value; None if it, or a message on the way to it, is absent."""
    *outer, name = path.split(".")
    for step in outer:
        message = getattr(message, step)
    field = message.DESCRIPTOR.fields_by_name[name]
    absent = field.has_presence and not message.HasField(name)
    return field, None if absent else getattr(message, name)


def _text(field: Any, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {count}" for key, count in sorted(value.items()))
    elif field.is_repeated:
        text = ", ".join(value)
    elif isinstance(value, Message):
        text = ", ".join(f"{inner.name} {_plain(value, inner.name)}" for inner in value.DESCRIPTOR.fields)
    elif field.enum_type is not None:
        text = enum_name(field.enum_type, value)
    elif isinstance(value, float):
        text = f"{value:.0f}"
    else:
        text = str(value)
    return _CONTROL.sub(" ", text)


def _plain(message: Message, path: str) -> str:
    return _text(*_find(message, path))


def _rich(message: Message, path: str, absent: str = "") -> Text:
    field, value = _find(message, path)
    if isinstance(value, Timestamp):
        return Text(relative(value.ToDatetime(UTC), datetime.now(UTC)))
    text = _text(field, value)
    if not text:
        return Text(absent, "dim")
    return Text(text, _STYLES.get(text, "") if field.name in _STYLED else "")


def _moment(message: Message, path: str) -> Text:
    _, value = _find(message, path)
    if isinstance(value, Timestamp):
        return Text(f"{value.ToDatetime(UTC).astimezone():%H:%M:%S}", "dim")
    text = _rich(message, path)
    text.pad_right(max(0, _EVENT_WIDTH - len(text)))
    return text


def _print(what: Table | Text) -> None:
    Console().print(what, soft_wrap=isinstance(what, Text))
