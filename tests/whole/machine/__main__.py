"""Random programs for as long as asked for: `python -m tests.whole.machine --minutes 60`."""

import time
import traceback
from typing import Annotated

import torch
import typer
from hypothesis import Phase

from tests.whole.machine.programs import TRIED, tried


def main(
    minutes: Annotated[float, typer.Option(help="How long to go on.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Rules in a program, at most.")] = 25,
    shrink: Annotated[
        bool, typer.Option(help="Whether to look for the shortest program for what it finds.")
    ] = False,
) -> None:
    """Try random programs on random residual nets; print what was done, and every program that came out otherwise."""
    torch.set_num_threads(1)
    end, found = time.monotonic() + 60 * minutes, 0
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    while time.monotonic() < end:
        try:
            tried(100, steps, database=None, phases=phases)
        except Exception as error:  # noqa: BLE001 - told, and the next one is tried
            found += 1
            traceback.print_exception(error)
        typer.echo(f"{found} found; {dict(TRIED)}")
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
