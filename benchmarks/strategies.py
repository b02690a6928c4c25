"""The ways of doing a training step that are compared; a new one is one more entry of `STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from revwire.errors import RevwireError

Strategy = Callable[[nn.Module, Any], nn.Module]


def plain(model: nn.Module, inputs: Any) -> nn.Module:  # noqa: ARG001 - all strategies take the same
    """Leave the model as it is."""
    return model


def checkpointed(model: nn.Module, inputs: Any) -> nn.Module:
    """Checkpoint the activations of every block, with torch's non-reentrant checkpoint.

    timm's models have a switch for it; of other models, every module that rewiring would work on is a block.

    Raises:
        RevwireError: timm was told to use the reentrant variant, or the model has no residual blocks.
    """
    if hasattr(model, "set_grad_checkpointing"):
        from timm.layers import use_reentrant_ckpt

        if use_reentrant_ckpt():
            raise RevwireError("timm is set to reentrant checkpoints (TIMM_REENTRANT_CKPT): unset it")
        model.set_grad_checkpointing()
        return model
    import revwire

    names = {step.module for step in revwire.plan(model, inputs).steps}
    if not names - {""}:
        raise RevwireError(f"{type(model).__name__} has no residual blocks to checkpoint")
    for name in names - {""}:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def rewired(model: nn.Module, inputs: Any) -> nn.Module:
    """Rewire the model, with the default coupling."""
    import revwire

    return revwire.rewire(model, inputs)


STRATEGIES: dict[str, Strategy] = {"plain": plain, "checkpoint": checkpointed, "rewired": rewired}
