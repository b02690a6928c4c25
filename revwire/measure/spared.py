"""How much of a branch's second run an anchor spares: what comes after the last tensor that the run saves.

Counted in floating-point operations on tensors of the meta device, so nothing is computed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from revwire.find.branch_code import step_code
from revwire.measure.fake_step import empty_like, moved
from revwire.pytree import tree_map

if TYPE_CHECKING:
    from revwire.find.residual import Residual


def spared(residual: Residual) -> int:
    """Operations of a residual's branch after the last tensor that it saves: the last product, in most.

    0 where the branch does not run on tensors without values.
    """
    on_meta = partial(empty_like, device=torch.device("meta"))
    module = moved(residual.frame.module, on_meta)
    x, *sides = (tree_map(on_meta, n.meta["value"]) for n in (residual.skip, *residual.sides))
    code = step_code(residual)
    at_last = 0
    counter = FlopCounterMode(display=False)

    def note(tensor: Tensor) -> Tensor:
        nonlocal at_last
        if not isinstance(tensor, nn.Parameter):
            at_last = counter.get_total_flops()
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    try:
        with torch.enable_grad(), counter, saved_tensors_hooks(note, same):
            code.block(module, x.detach().requires_grad_(), *sides)
    except (RuntimeError, NotImplementedError):
        return 0
    return counter.get_total_flops() - at_last
