"""What commands show while they take long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

_TOLD_S = 5.0


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_time or task.elapsed or 0:5.1f} s")


class StartProgress:
    """On a terminal a spinner per part, with its time; elsewhere a line for each part that is ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinners = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<12}"),
            _Elapsed(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._spinners.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._spinners.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, the part is starting; it is ready when the block ends without an error."""
        began = time.monotonic()
        task = self._spinners.add_task(name, total=1)
        yield
        self._spinners.update(task, completed=1)
        if not self._console.is_terminal:
            self._console.print(f"{name:<12} ready after {time.monotonic() - began:.1f} s", highlight=False)


def counted() -> Callable[[int, int], None]:
    """Tells on standard error how far it is, now and then."""
    told = time.monotonic()

    def tell(seen: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_S:
            told = time.monotonic()
            typer.echo(f"{seen} of {total}", err=True)

    return tell
