"""Printing: the console for the tables, and the progress bar of a measurement."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WIDE = 120


def console() -> Console:
    """The terminal; where there is none (a file, a log), a width that cuts off no figure."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(terminal.width, _WIDE))


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal for a run of `total` steps; gives what is to be called before each, with its name."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, description=what, advance=1)
