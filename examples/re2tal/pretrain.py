"""Fine-tune the backbone on the classes of actions before detection, and write its weights for `train`.

    python -m examples.re2tal.pretrain synthetic
    python -m examples.re2tal.train synthetic backbone.weights=runs/synthetic/pretrain/backbone.safetensors

A run that was stopped goes on where it was: give the same command again.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from examples.re2tal.config import read_config
from examples.re2tal.errors import Re2TALError
from examples.re2tal.training.pretraining import pretrain
from revwire.errors import RevwireError


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.of.the.setting=value ...")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fine-tune the backbone on the classes of actions, before detection.

    Example: python -m examples.re2tal.pretrain synthetic memory.strategy=rewired
    """
    try:
        path, accuracy = pretrain(read_config(config, overrides or []), device)
    except (Re2TALError, RevwireError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console = Console()
    console.print(f"{accuracy:.1%} of the held-out actions are named rightly", highlight=False)
    console.print(f"weights: {path}; train with backbone.weights={path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
