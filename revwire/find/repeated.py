"""Children that are alike, called alike, run once on fake tensors: what the next one returns has the same shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import memory_of
from revwire.find.alike import plain_attributes
from revwire.pytree import tree_flatten, tree_unflatten
from revwire.trace.frame import identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from revwire._torch import TreeSpec
    from revwire.trace.frame import Identity

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Repeated:
    """Runs modules on fake tensors, each kind once for each kind of call.

    Args:
        origins: Which tensor each rearranged tensor came from: a trunk that is only moved around is still that trunk.
    """

    def __init__(self, origins: dict[Identity, Identity]) -> None:
        self._origins = origins
        self._kinds: dict[int, tuple[Any, ...] | None] = {}
        self._known: dict[tuple[Any, ...], tuple[list[Any], TreeSpec]] = {}

    def run(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`forward(*args, **kwargs)`, or fresh tensors of the shapes that a module like this one returned before."""
        leaves, spec = tree_flatten((args, kwargs))
        kind = self._kind(module)
        if kind is None or not all(isinstance(leaf, Tensor) or type(leaf) in _PLAIN for leaf in leaves):
            return forward(*args, **kwargs)
        key = (kind, spec, *map(_likeness, leaves))
        if key in self._known:
            made, structure = self._known[key]
            return tree_unflatten([_fresh(leaf) for leaf in made], structure)
        before = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        given = {memory_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        held = {memory_of(t) for t in (*module.parameters(), *module.buffers())}
        output = forward(*args, **kwargs)
        made, structure = tree_flatten(output)
        tensors = [leaf for leaf in made if isinstance(leaf, Tensor)]
        new = all(
            memory_of(leaf) not in given | held and identity(leaf) not in self._origins for leaf in tensors
        )
        plain = all(isinstance(leaf, Tensor) or type(leaf) in _PLAIN for leaf in made)
        kept = before == [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        # what changes its input, or hands on a part of it, runs itself
        if new and plain and kept and len({memory_of(leaf) for leaf in tensors}) == len(tensors):
            self._known[key] = [_likeness(leaf) for leaf in made], structure
        return output

    def _kind(self, module: nn.Module) -> tuple[Any, ...] | None:
        """What modules that return the same shapes have in common; None where that cannot be told."""
        if id(module) not in self._kinds:
            self._kinds[id(module)] = _kind_of(module)
        return self._kinds[id(module)]


def _kind_of(module: nn.Module) -> tuple[Any, ...] | None:
    if "forward" in module.__dict__:
        return None
    other = tuple(
        (key, id(value))
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and not isinstance(value, (*_PLAIN, tuple))
    )
    stores = (*module._parameters.items(), *module._buffers.items())
    tensors = tuple((key, None if t is None else _likeness(t)) for key, t in stores)
    children = tuple((name, child and _kind_of(child)) for name, child in module._modules.items())
    if any(child is None for _, child in children):
        return None
    return type(module), plain_attributes(module), other, tensors, children


def _likeness(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return "tensor", leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return "value", type(leaf), leaf


def _fresh(likeness: Any) -> Any:
    kind, *what = likeness
    if kind == "value":
        return what[1]
    shape, stride, dtype, device, requires_grad = what
    made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    # no leaf: those must not be changed in place
    return made.requires_grad_().clone() if requires_grad else made
