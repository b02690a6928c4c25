"""Where the tables go."""

from rich.console import Console

_WIDE = 120


def console() -> Console:
    """The terminal; where there is none (a file, a log), a width that cuts off no figure."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(terminal.width, _WIDE))
