"""Copies of modules that `copy.deepcopy` alone refuses: those that hold what a forward computed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from revwire.pytree import is_object

if TYPE_CHECKING:
    from collections.abc import Iterator

_Module = TypeVar("_Module", bound=nn.Module)


def copied(module: _Module) -> _Module:
    """A deep copy of a module, in which tensors that are part of a graph are their numbers.

    Such are activations that a forward left on a module, a loss, and the weight that the old `weight_norm` computes
    before each forward.
    """
    computed = {id(tensor): tensor for tensor in _computed(module, set())}
    return copy.deepcopy(module, {key: tensor.detach().clone() for key, tensor in computed.items()})


def _computed(held: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        if held.grad_fn is not None:
            yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _computed(value, seen)
    elif isinstance(held, list | tuple | set):
        for value in held:
            yield from _computed(value, seen)
    elif isinstance(held, nn.Module) or is_object(held):
        yield from _computed(vars(held), seen)
