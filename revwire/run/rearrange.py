"""Bijective rearrangements: operations that move a tensor's values around and lose none.

They act on both streams of a chain alike, so a trunk may be reshaped or permuted between two steps (Swin's half
blocks, channels-last nets) without leaving the chain. Both the finding of chains and their running ask here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def functions(names: str) -> frozenset[Callable[..., Any]]:
    """What torch and its tensors call by these names, of which either may have only some."""
    owners = (torch, Tensor)
    return frozenset(f for name in names.split() for o in owners if (f := getattr(o, name, None)) is not None)


_PERMUTING = functions("permute transpose t swapaxes swapdims movedim moveaxis adjoint")
_RESHAPING = functions("reshape view view_as reshape_as flatten unflatten squeeze unsqueeze ravel")
_KEEPING = functions("contiguous")


def is_rearrangement(
    function: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether calling a torch function or tensor method this way only moves the values of its first argument."""
    if function is Tensor.to:  # x.to(memory_format=torch.channels_last), and nothing else asked of it
        return len(args) == 1 and set(kwargs or ()) == {"memory_format"}
    if function is Tensor.view and any(isinstance(a, torch.dtype) for a in args):
        return False
    return function in _PERMUTING or function in _RESHAPING or function in _KEEPING


def inverse(
    function: Any, shape: torch.Size, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The operation that takes `function(x, *args, **kwargs)` back to `x`, for an `x` of `shape`."""
    if function in _PERMUTING:
        # sizes that are all different make the result's shape spell out the permutation
        distinct = torch.empty(tuple(range(1, len(shape) + 1)), device="meta")
        order = [size - 1 for size in function(distinct, *args, **kwargs).shape]
        return partial(torch.permute, dims=[order.index(i) for i in range(len(order))])
    return partial(torch.reshape, shape=tuple(shape))
