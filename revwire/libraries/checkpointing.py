"""The libraries' own switches for activation checkpointing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError

if TYPE_CHECKING:
    from torch import nn


def switch_on(model: nn.Module) -> bool:
    """Have a model checkpoint its blocks by the switch of its library; says whether it has one.

    Raises:
        RevwireError: timm was told to use the reentrant variant.
    """
    if not hasattr(model, "set_grad_checkpointing"):
        return False
    from timm.layers import use_reentrant_ckpt

    if use_reentrant_ckpt():
        raise RevwireError("timm is set to reentrant checkpoints (TIMM_REENTRANT_CKPT): unset it")
    switch: Any = model.set_grad_checkpointing
    switch()
    return True
