"""How a backbone does its training step: plain, checkpointed, rewired, or not trained at all.

The one place of the example that rewires: everything else is as it would be without revwire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import revwire
from examples.re2tal.errors import Re2TALError
from revwire.measure.strategies import treated

if TYPE_CHECKING:
    from torch import Tensor, nn


def lay_out(backbone: nn.Module, example: Tensor, *, strategy: str = "rewired", **dials: Any) -> nn.Module:
    """Prepare a backbone to do its training steps by one strategy.

    Args:
        backbone: The backbone as it was built, with its pretrained weights; changed in place.
        example: A clip (batch, 3, frames, height, width) as training will have it; may lie on the meta device.
        strategy: *plain*; *checkpoint*: every block is checkpointed; *rewired*; *frozen*: nothing is trained.
        dials: Keyword arguments of `revwire.rewire`, for *rewired*.

    Raises:
        Re2TALError: there is no such strategy, or dials were given to one that has none.
    """
    if dials and strategy != "rewired":
        raise Re2TALError(f"memory.{next(iter(dials))} is for memory.strategy=rewired, which is {strategy!r}")
    if strategy == "rewired":
        return revwire.rewire(backbone, (example,), **dials)
    if strategy == "frozen":
        return backbone.requires_grad_(False)
    if strategy in {"plain", "checkpoint"}:
        return treated(backbone, (example,), strategy)
    raise Re2TALError(f"memory.strategy is {strategy!r}; choose one of plain, checkpoint, rewired, frozen")
