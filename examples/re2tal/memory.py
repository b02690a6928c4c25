"""Print what a training step of an experiment needs, done in several ways, before it is run.

python -m examples.re2tal.memory swin_t_thumos14
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated

import torch
import typer

import revwire
from examples.re2tal.console import terminal
from examples.re2tal.training.memory import estimates_of
from revwire.checkpoint.disk import write_text


def main(
    configs: Annotated[list[str], typer.Argument(help="YAML files, or names of shipped configurations.")],
    change: Annotated[list[str] | None, typer.Option("--set", help="A setting, as key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON, too.")] = None,
) -> None:
    """Print what a training step of an experiment needs, done in several ways, before it is run.

    Example: python -m examples.re2tal.memory swin_t_thumos14 videomae_l_thumos14 --set optim.batch=1
    """
    found = {}
    for name in configs:
        estimates = estimates_of(name, overrides=change or ())
        terminal().print(estimates)
        found[name] = estimates.to_dict()
    if out is not None:
        about = {"torch": torch.__version__, "revwire": revwire.__version__, "counted": "on fake tensors"}
        write_text(out, json.dumps({**about, "estimates": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
