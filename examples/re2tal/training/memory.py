"""How a backbone does its training step: plain, checkpointed, rewired, or not trained at all.

This is the one place of the example that knows of revwire.

    python -m examples.re2tal.memory swin_t_thumos14
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

import revwire
from examples.re2tal.errors import Re2TALError
from revwire.measure.strategies import treated

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "plain"},
    "checkpoint": {"strategy": "checkpoint"},
    "rewired": {"strategy": "rewired"},
    "rewired, chunks=16, transitions": {"strategy": "rewired", "chunks": 16, "transitions": "checkpoint"},
}
"""What `python -m examples.re2tal.memory` compares."""


def lay_out(backbone: nn.Module, example: Tensor, *, strategy: str = "rewired", **dials: Any) -> nn.Module:
    """Have a backbone do its training step in some way.

    Args:
        backbone: The backbone as it was built, with its pretrained weights; changed in place.
        example: A clip (batch, 3, frames, height, width) as training will have it; may lie on the meta device.
        strategy: *plain*; *checkpoint*, of every block; *rewired*; *frozen*: nothing of it is trained.
        dials: Keyword arguments of `revwire.rewire`, for *rewired*.

    Raises:
        Re2TALError: there is no such strategy, or dials were given to one that has none.
    """
    if dials and strategy != "rewired":
        raise Re2TALError(f"memory.{next(iter(dials))} is for memory.strategy=rewired, which is {strategy!r}")
    if strategy == "rewired":
        return revwire.rewire(backbone, (example,), **dials)
    if strategy == "frozen":
        return backbone.requires_grad_(False)  # torch's own signature
    if strategy in {"plain", "checkpoint"}:
        return treated(backbone, (example,), strategy)
    raise Re2TALError(f"memory.strategy is {strategy!r}; choose one of plain, checkpoint, rewired, frozen")


def table_of(
    name: str,
    limit: str | None = None,
    overrides: Sequence[str] = (),
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
) -> revwire.Estimates:
    """What one training step of an experiment needs, done in several ways; the head and AdamW included.

    Args:
        name: The experiment, as for `read_config`.
        limit: A size such as 24GiB, to find the longest clip that fits; not looked for if not given.
        overrides: As for `read_config`.
        ways: Names of ways, and the arguments of `lay_out`.
    """
    from examples.re2tal.config import read_config
    from examples.re2tal.evaluation.inference import AMP
    from examples.re2tal.training.setup import detector_of

    # the ways take the place of what the experiment does
    config = read_config(name, [*overrides, "memory={strategy: plain}"])
    clip, batch = config.clip, config.optim.batch
    with torch.device("meta"):
        detector = detector_of(config, classes=20, weights=False)
        frames = torch.empty(batch, clip.frames, 3, *clip.size, dtype=torch.uint8)
        mask = torch.ones(batch, clip.positions, dtype=torch.bool)

    def in_way(arguments: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
        def laid_out(model: Any) -> nn.Module:
            example = torch.empty(batch, 3, clip.frames, *clip.size, device="meta")
            model.backbone = lay_out(model.backbone, example, **arguments)
            made: nn.Module = model
            return made

        return laid_out

    return revwire.estimate(
        detector,
        (frames, mask),
        strategies={way: in_way(arguments) for way, arguments in ways.items()},
        autocast=AMP[config.optim.amp],
        limit=limit,
        loss_fn=lambda predictions: predictions.logits.float().sum() + predictions.offsets.float().sum(),
        device="cpu",
    )


def main(
    configs: Annotated[list[str], typer.Argument(help="YAML files, or names of shipped configurations.")],
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON, too.")] = None,
) -> None:
    """Print what a training step of an experiment needs, done in several ways, before it is run.

    Example: python -m examples.re2tal.memory swin_t_thumos14 videomae_l_thumos14
    """
    found = {}
    for name in configs:
        estimates = table_of(name)
        Console().print(estimates)
        found[name] = estimates.to_dict()
    if out is not None:
        about = {"torch": torch.__version__, "revwire": revwire.__version__, "counted": "on fake tensors"}
        out.write_text(json.dumps({**about, "estimates": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
