"""What the commands print, and how they end: in one line, with nothing half written."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from examples.re2tal.errors import Re2TALError
from revwire.cli.ending import ended_in_order
from revwire.cli.terminal import Terminal
from revwire.errors import RevwireError

if TYPE_CHECKING:
    from collections.abc import Iterator


def terminal(*, stderr: bool = False, quiet: bool = False) -> Terminal:
    """A console that prints names of classes, videos and folders as they are, whatever brackets are in them."""
    return Terminal(stderr=stderr, quiet=quiet, markup=False, highlight=False)


@contextmanager
def ended_by_errors(*others: type[Exception]) -> Iterator[None]:
    """An expected error, or one of the disk's, ends the command with one line on stderr and exit code 1.

    Args:
        others: Further errors whose message is for the user.
    """
    try:
        with ended_in_order():
            yield
    except (Re2TALError, RevwireError, *others) as error:
        told = str(error)
    except OSError as error:
        told = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    else:
        return
    terminal(stderr=True).print(Text.assemble(("error:", "red"), f" {told}"), soft_wrap=True)
    raise typer.Exit(1)
