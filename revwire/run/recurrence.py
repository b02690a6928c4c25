"""The two-step recurrence over two streams, and its inverse.

x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])          inverse: x[i-1] = (x[i+1] - b*x[i] - c*F_i(x[i])) / a
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)


_PROMOTED = {(one, other): torch.promote_types(one, other) for one in _FLOATS for other in _FLOATS}


def promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """`torch.promote_types`, looked up: the function itself is an operation, which exported graphs would keep."""
    known = _PROMOTED.get((one, other))
    return torch.promote_types(one, other) if known is None else known


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """The coefficients of one step of one run, kept for its inverse: numbers, or one per sample (BDIA).

    Attributes:
        a: Weight of `x[i-1]`; a tensor has the trunk's number of dimensions, all but the first of size 1.
        b: Weight of `x[i]`.
        c: Weight of the branch's output.
    """

    a: float | Tensor
    b: float | Tensor
    c: float | Tensor

    def change(self, current: Tensor, branch: Tensor) -> Tensor:
        """`b * x[i] + c * F_i(x[i])`: what a step adds to its share of `x[i-1]`."""
        if not _is(self.c, 1):
            branch = self.c * branch.to(promoted(branch.dtype, current.dtype))
        if _is(self.b, 0):
            return branch
        # streams come first: the sum takes the layout of its first operand, and a trunk keeps its layout
        return (current if _is(self.b, 1) else self.b * current) + branch

    def advance(self, previous: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i+1]` from `x[i-1]`, `x[i]` and `F_i(x[i])`."""
        change = self.change(current, branch)
        if _is(self.a, 0):
            return change
        return (previous if _is(self.a, 1) else self.a * previous) + change

    def retreat(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i-1]` from `x[i+1]`, `x[i]` and `F_i(x[i])`: the inverse of `advance`, up to rounding."""
        rest = following - self.change(current, branch)
        return rest if _is(self.a, 1) else rest / self.a

    def retreat_(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`retreat`, with its result in the memory of `following`."""
        following.sub_(self.change(current, branch))
        return following if _is(self.a, 1) else following.div_(self.a)

    def of_slice(self, part: int, slices: int) -> Weights:
        """The coefficients of the samples in one of so many slices of the batch."""
        a, b, c = (w.chunk(slices)[part] if isinstance(w, Tensor) else w for w in (self.a, self.b, self.c))
        return Weights(a, b, c)


def _is(weight: float | Tensor, value: float) -> bool:
    return not isinstance(weight, Tensor) and weight == value
