"""Prepares the copy that `verify` measures, so that no check passes for the wrong reason.

The BatchNorm statistics of a new network are moved and constant inputs become noise: with them as they are, a wrong
result could equal the right one.
"""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import AnyBatchNorm
from revwire.libraries.noise import Noise
from revwire.pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Iterator


def move_statistics(model: nn.Module, args: Any, kwargs: Any) -> None:
    """BatchNorm statistics as training leaves them: those of a new net normalise nothing in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, AnyBatchNorm) and m.num_batches_tracked is not None]
    fresh = [(m, m.momentum) for m in norms if not m.num_batches_tracked]
    if not fresh:
        return
    modes = [(module, module.training) for module in model.modules()]
    for norm, _ in fresh:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(*args, **kwargs)
    for norm, momentum in fresh:
        norm.momentum = momentum
    for module, training in modes:
        module.training = training


def noisy_like(tree: Any) -> Any:
    """A structure with noise for each constant floating-point tensor in it, such as zeros made for their shape."""
    noise = Noise()

    def noisy(leaf: Any) -> Any:
        constant = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1
        if constant and bool((leaf == leaf.flatten()[0]).all()):
            return noise.normal(leaf.shape).to(leaf)
        return leaf

    return tree_map(noisy, tree)


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """A structure with its floating-point tensors in `dtype`; as it is for None."""
    if dtype is None:
        return tree
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


@torch.no_grad()
def move_weights(model: nn.Module, draw: int) -> None:
    """Move all weights by a thousandth, the same for the same draw, before they get another dtype."""
    noise = Noise(draw)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + 1e-3 * noise.normal(parameter.shape).to(parameter))


def seed(number: int) -> None:
    """Seed all generators that a model may draw from: torch's, Python's and numpy's."""
    torch.manual_seed(number)
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The random states after the block are the ones before it: torch's, Python's and numpy's."""
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returned."""
    leaves = tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors; in float64 relative to the largest value."""
    if wanted.shape != found.shape:
        return float("inf")
    largest = float((wanted - found).abs().max()) if wanted.numel() else 0.0
    return largest / max(float(wanted.abs().max()), 1e-300) if wanted.dtype == torch.float64 else largest
