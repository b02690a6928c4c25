"""Command lines run within the test, and what they and tables print."""

import typer
from rich.console import Console
from typer.testing import CliRunner


def command_of(main, *always):
    """Runs a function of typer options with these arguments and those it is called with."""
    app = typer.Typer()
    app.command()(main)
    return lambda *args: CliRunner().invoke(app, [*args, *map(str, always)])


def in_one_line(text):
    """What typer prints in a frame."""
    return " ".join(text.replace("│", " ").split())


def printed(table, width=60):
    """The lines of a table that hold anything."""
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines() if line.strip()]
