"""Fine-tune the backbone on the classes of actions before detection, and write its weights for `train`.

    python -m examples.re2tal.pretrain synthetic
    python -m examples.re2tal.train synthetic backbone.weights=runs/synthetic/pretrain/backbone.safetensors

A run that was stopped goes on where it was: give the same command again.
"""

from __future__ import annotations

from typing import Annotated

import typer

from examples.re2tal.config import read_config
from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.training.pretraining import pretrain


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.of.the.setting=value ...")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fine-tune the backbone on the classes of actions, before detection.

    Example: python -m examples.re2tal.pretrain synthetic memory.strategy=rewired
    """
    with ended_by_errors():
        path, accuracy = pretrain(read_config(config, overrides or []), device)
    console = terminal()
    console.print(f"{accuracy:.1%} of the held-out actions are named rightly")
    console.print(f"weights: {path}; train with backbone.weights={path}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
