"""A few numbers of what a branch computed in forward, compared when it runs again: the second run is the first run.

Whatever could not be put back, or was not known to matter, shows in the numbers. Rounding shows too: the second run's
input is reconstructed, so its numbers differ by the rounding of the streams times what the coupling's inverse makes of
it, and where a branch decides by its numbers (the expert of a token, the nearest code) a few of them may be others
altogether. Both are far from what a changed condition does: measured over convolutional nets and transformers, right
runs differ by at most 6e-6 of the numbers' size in float32 and 2e-2 in bfloat16, wrong ones by 0.4 and more.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from revwire._torch import only_shapes, wraps_others
from revwire.run.ambient import is_capturing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

SIZE = 64
"""How many numbers are looked at."""

_BY_ROUNDING = 2.0
"""Numbers may differ by so many times the square root of their precision: far above rounding, far below a fault."""
_BY_INVERSE, _AT_LEAST = 200.0, 0.02
"""And by so many times what the inverse has added to it, where it adds any, and no less than that.

A branch adds to it what the coupling does not know of: a token of zeros before a LayerNorm came out 0.01 off in the
first step of a BEiT with momentum(gamma=0.5). And the precision is the branch's own: a trunk that is a little off turns
over the rounding of what a branch computes in bfloat16, which BDIA then doubles with each step.
"""
_UNTELLING = 0.5
"""Where that comes to more, nothing can be told."""
_EXACT = 8.0
"""In an exact chain inputs are the same to the bit; kernels may still add up in another order, by so many roundings."""
_SINGLE = torch.finfo(torch.float32).eps
_FEW, _SOME = 16, 4
"""One in so many numbers may be another altogether, in float32 and in lower precision."""


class Comparison(NamedTuple):
    """The same numbers of both runs of a step, to be looked at when the backward is over.

    Attributes:
        step: What messages call it.
        first: Those of the first run.
        second: Those of the second.
        bound: By how much of their size they may differ.
        allowed: How many of them may be others altogether.
    """

    step: str
    first: Tensor
    second: Tensor
    bound: float
    allowed: int

    @classmethod
    def of_sums(cls, what: str, first: Tensor, second: Tensor) -> Comparison:
        """Of two whole numbers that have to be the same."""
        one = torch.ones(1, device=first.device)
        return cls(what, one, one + (first != second), 0.0, 0)


class Sample:
    """Some numbers of a tensor, spread over all of it.

    Args:
        tensor: The tensor.
        precision: The epsilon of the lowest precision that it was computed in.
    """

    __slots__ = ("dtype", "numbers", "precision", "shape")

    def __init__(self, tensor: Tensor, precision: float) -> None:
        self.numbers, self.precision = _take(tensor), precision
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def compared(self, step: str, tensor: Tensor, amplified: float | None) -> Comparison | None:
        """The same numbers of what the second run of a step computed; None where they could tell nothing.

        Args:
            step: What messages call it.
            tensor: What the second run computed, of the same shape and dtype.
            amplified: How many times the rounding in its input has grown; None where there is none, in an exact chain.
        """
        bound = _bound(self.precision, amplified)
        if bound is None:
            return None
        few = 0 if amplified is None else _FEW if self.precision <= _SINGLE else _SOME
        return Comparison(step, self.numbers, _take(tensor), bound, few and self.numbers.numel() // few)


@torch.no_grad()
def differing(compared: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """The steps whose runs were not the same, each with how far its numbers are off, relative to their size.

    All are looked at in one go, so that no step waits for its device. What goes into a CUDA graph has no numbers yet,
    and is replayed as it was captured: nothing that Python decides can come out differently then.
    """
    alike: dict[tuple[Any, ...], list[Comparison]] = {}
    for each in () if only_shapes() or is_capturing() else compared:
        alike.setdefault((each.first.numel(), each.first.dtype, each.first.device), []).append(each)
    for group in alike.values():
        wide = torch.promote_types(group[0].first.dtype, torch.float32)
        # the one place where the host waits for the device
        both = torch.stack([c.first for c in group] + [c.second for c in group]).to("cpu", wide)
        first, second = both.chunk(2)
        bound, allowed = first.new_tensor([(c.bound, c.allowed) for c in group]).unbind(1)
        apart = second - first
        # as a whole they are nearer than each may be: nothing more to look at
        near = torch.linalg.vector_norm(apart, dim=1) * math.sqrt(first.shape[1])
        if bool((near <= bound * torch.linalg.vector_norm(first, dim=1)).all()):
            continue
        apart = apart.abs_()
        size = first.nan_to_num(0, 0, 0).square().mean(1).sqrt()
        same = (apart <= (bound * size)[:, None]) | (first == second) | (first.isnan() & second.isnan())
        farthest = apart.nan_to_num(torch.inf, torch.inf).where(~same, 0.0).amax(1) / size.clamp_min(1e-30)
        for each, off in zip(group, farthest.where((~same).sum(1) > allowed, 0.0).tolist(), strict=True):
            if off:
                yield each.step, off


def can_sample(tensor: Tensor) -> bool:
    """Whether numbers of a tensor can be looked at."""
    plain = tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel() > 0
    return plain and not tensor.is_meta and not wraps_others(tensor)


@functools.cache
def epsilon(dtype: torch.dtype) -> float:
    """The precision of a dtype of floating-point numbers."""
    return float(torch.finfo(dtype).eps)


@functools.lru_cache(maxsize=4096)
def _bound(precision: float, amplified: float | None) -> float | None:
    """The relative difference that may be rounding; None where no difference would tell anything."""
    if amplified is None:
        return _EXACT * precision
    bound = _BY_ROUNDING * math.sqrt(precision)
    if amplified > 1:
        bound += _AT_LEAST + _BY_INVERSE * precision * (amplified - 1)
    return bound if bound < _UNTELLING else None


def _take(tensor: Tensor) -> Tensor:
    if only_shapes():  # an estimate counts their bytes
        return tensor.new_empty(min(SIZE, tensor.numel()))
    return torch.take(tensor.detach(), _places(tensor.numel(), tensor.device))


@functools.lru_cache(maxsize=512)
def _places(count: int, device: torch.device) -> Tensor:
    """Evenly spread places among `count`; an odd distance, so that they fall on other channels and tokens each time."""
    with torch.inference_mode(False):
        size = min(SIZE, count)
        return (torch.arange(size) * max(1, count // size | 1) % count).to(device)
