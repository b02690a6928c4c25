"""The ways of doing a training step that are compared: as it is, with activation checkpointing, rewired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from revwire.errors import RevwireError
from revwire.libraries.checkpointing import switch_on
from revwire.measure.rewired import rewired
from revwire.rewrite.recording import Recording

Strategy = str | Mapping[str, Any] | Callable[[nn.Module], nn.Module]
"""`"plain"`, `"checkpoint"`, one of `STRATEGIES`, the keyword arguments of `revwire.rewire`, or a function."""

STRATEGIES: dict[str, Mapping[str, Any] | None] = {
    "plain": None,
    "checkpoint": None,
    "rewired": {},
    "transitions": {"transitions": "checkpoint"},
    "anchored": {"anchor": "*", "transitions": "checkpoint"},
    "lean": {"chunks": 8, "transitions": "checkpoint"},
}
"""By name: what is passed to `revwire.rewire`; None where it is not called."""


def treated(model: nn.Module, inputs: Any, strategy: Strategy) -> nn.Module:
    """Have `model` do its training step in some way; changes it in place, and returns it.

    Args:
        model: The model as it was built.
        inputs: What its forward takes, as for `revwire.plan`.
        strategy: See `Strategy`.

    Raises:
        RevwireError: there is no such strategy, or it cannot treat this model.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise RevwireError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}")
        if strategy == "plain":
            return model
        if strategy == "checkpoint":
            return checkpointed(model, inputs)
        strategy = STRATEGIES[strategy] or {}
    return strategy(model) if callable(strategy) else rewired(model, inputs, **strategy)[0]


def checkpointed(model: nn.Module, inputs: Any) -> nn.Module:
    """Checkpoint the activations of every block, with torch's non-reentrant checkpoint.

    Libraries have a switch for it; of other models, every module that rewiring would work on is a block.

    Raises:
        RevwireError: the library was told to use the reentrant variant, or the model has no residual blocks.
    """
    if switch_on(model):
        return model
    names = {step.module for step in Recording.of(model, inputs).fresh.steps}
    if not names - {""}:
        raise RevwireError(f"{type(model).__name__} has no residual blocks to checkpoint")
    for name in names - {""}:
        block: Any = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model
