"""How results print: as tables of text, with sizes as a person writes them."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Printed:
    """A result that prints as rich tables, also where no rich console asks (`print`, a log, a notebook)."""

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """What rich prints."""
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from rich.console import Console

        console = Console(
            width=_WIDTH, record=True, file=io.StringIO(), force_terminal=True, force_jupyter=False
        )
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_IN_NOTEBOOK)


_WIDTH = 110
_IN_NOTEBOOK = '<pre style="line-height: 1.2; white-space: pre; overflow-x: auto">{code}</pre>'


def in_words(size: float) -> str:
    """A number of bytes as a person writes it: `1.50 GiB`, `37.2 MiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def first_few(names: Sequence[str], most: int) -> str:
    """At most so many names, and how many there are beside them: `a, b and 3 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size_of(text: str | int) -> int:
    """A number of bytes from `"24GiB"`, `"24G"`, `"800 MiB"` or a number.

    Raises:
        RevwireError: it is none.
    """
    if isinstance(text, int):
        return text
    matched = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if matched is None:
        raise RevwireError(f"{text!r} is no size; write 24GiB, 800MiB or a number of bytes")
    return int(float(matched[1]) * _UNITS[matched[2]])
