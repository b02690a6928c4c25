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
from typing import TYPE_CHECKING

import torch

from revwire._torch import only_shapes, wraps_others

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 64
"""How many numbers are looked at."""

_BY_ROUNDING = 2.0
"""Numbers may differ by so many times the square root of their precision: far above rounding, far below a fault."""
_BY_INVERSE = 20.0
"""And by so many times the error that the inverse is expected to make."""
_UNTELLING = 0.5
"""Where that comes to more, nothing can be told."""
_EXACT = 8.0
"""In an exact chain inputs are the same to the bit; kernels may still add up in another order, by so many roundings."""
_FEW, _SOME = 16, 4
"""One in so many numbers may be another altogether, in float32 and in lower precision."""


class Sample:
    """Some numbers of a tensor, spread over all of it.

    Args:
        tensor: The tensor.
        precision: The epsilon of the lowest precision that it was computed in.
    """

    __slots__ = ("numbers", "precision")

    def __init__(self, tensor: Tensor, precision: float) -> None:
        self.numbers, self.precision = _take(tensor), precision

    def difference(self, tensor: Tensor, error: float | None) -> float | Tensor:
        """How far the same numbers of another tensor are off, relative to their size; 0 where that can be rounding.

        Args:
            tensor: What the second run computed.
            error: The relative error of its input that is expected; None where there is none, in an exact chain.

        Returns:
            A number; on a device that runs ahead of Python a tensor, so that nothing waits for it.
        """
        bound = _bound(self.precision, error)
        if bound is None:
            return 0.0
        first, second = self.numbers, _take(tensor)
        if first.device.type == "cpu":
            worst = float(torch.dist(second, first, math.inf))
            if not worst or worst * math.sqrt(len(first)) <= bound * float(torch.linalg.vector_norm(first)):
                return 0.0
        return _judged(first, second, bound, allowed=self._allowed(error))

    def _allowed(self, error: float | None) -> int:
        if error is None:
            return 0
        return len(self.numbers) // (_FEW if self.precision <= torch.finfo(torch.float32).eps else _SOME)


def can_sample(tensor: Tensor) -> bool:
    """Whether numbers of a tensor can be looked at."""
    plain = tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel() > 0
    return plain and not tensor.is_meta and not wraps_others(tensor) and not only_shapes()


def _bound(precision: float, error: float | None) -> float | None:
    """The relative difference that may be rounding; None where no difference would tell anything."""
    if error is None:
        return _EXACT * precision
    bound = _BY_ROUNDING * math.sqrt(precision) + _BY_INVERSE * error
    return bound if bound < _UNTELLING else None


def _judged(first: Tensor, second: Tensor, bound: float, *, allowed: int) -> float | Tensor:
    first, second = first.float(), second.float()
    size = first.nan_to_num(0, 0, 0).square().mean().sqrt()
    apart = (second - first).abs()
    same = (apart <= bound * size) | (first == second) | (first.isnan() & second.isnan())
    other = ~same
    off = torch.where(other, apart.nan_to_num(torch.inf, torch.inf), 0.0).max() / size.clamp_min(1e-30)
    told = torch.where(other.sum() > allowed, off, torch.zeros_like(off))
    return float(told) if told.device.type == "cpu" else told


def _take(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.take(tensor.detach(), _places(tensor.numel(), str(tensor.device)))


@functools.lru_cache(maxsize=512)
def _places(count: int, device: str) -> Tensor:
    """Evenly spread places among `count`; an odd distance, so that they fall on other channels and tokens each time."""
    with torch.inference_mode(False):
        size = min(SIZE, count)
        return (torch.arange(size) * max(1, count // size | 1) % count).to(device)
