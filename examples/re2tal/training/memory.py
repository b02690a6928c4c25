"""What one training step of an experiment needs, done in several ways: counted on fake tensors, nothing is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import revwire
from examples.re2tal.config import read_config
from examples.re2tal.detector import AMP
from examples.re2tal.training.setup import detector_of
from examples.re2tal.training.strategy import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "plain"},
    "checkpoint": {"strategy": "checkpoint"},
    "rewired": {"strategy": "rewired"},
    "rewired, chunks=16, transitions": {"strategy": "rewired", "chunks": 16, "transitions": "checkpoint"},
}
"""What `python -m examples.re2tal.memory` compares."""


def estimates_of(
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
    # each way brings its own strategy, so the experiment's is put aside
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
