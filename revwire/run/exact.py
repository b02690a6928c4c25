"""Fixed-point streams: an inverse that gives back `x[i-1]` bit for bit, at any depth.

The streams of an exact chain are ordinary float tensors whose values are multiples of 2^-bits. As long as they stay
below 2^24 of those units (2^53 in float64), sums and differences of them are exact, so

    x[i+1] = floor(a * x[i-1]) + round(b * x[i] + c * F_i(x[i]))             floor and round to the grid

loses only what floor cuts off: nothing for |a| = 1, and k bits a value for |a| = 2^-k, which are packed and kept.
The inverse takes the same rounded change away again and puts the k bits back. Gradients pass floor and round as if
they were not there (straight-through), so autograd sees the recurrence of the float streams.

Larger values are on the grid too, as floats beyond 2^24 units are whole multiples of a unit anyway; but a sum of such
values may be rounded, and then the inverse would be off. `revwire.run.watch` sees that, and has the step keep its
`x[i-1]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire.errors import RewireError

if TYPE_CHECKING:
    from revwire.run.coupling import Coupling
    from revwire.run.recurrence import Weights

HEADROOM_BITS = 8
"""A chosen grid takes values up to 2^8 times the largest that entered: pretrained trunks grow by 10 to 100 times."""

_MOST_DROPPED_BITS = 8


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:  # noqa: ARG004
        return torch.mul(x, 2.0**bits).round_().mul_(2.0**-bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


@dataclass(frozen=True)
class Grid:
    """The multiples of 2^-bits; `rewire(..., exact=Grid(12))` puts all streams on this one.

    Attributes:
        bits: Binary digits after the point, -100 to 100. In float32 values below 2^(24 - bits) are exact.

    Raises:
        RewireError: `bits` is no whole number in that range.
    """

    bits: int

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or abs(self.bits) > 100:
            raise RewireError(f"a grid has between -100 and 100 bits after the point, not {self.bits!r}")

    @classmethod
    def around(cls, x: Tensor) -> Grid:
        """The finest grid that holds values 2^8 times as large as those of `x`."""
        largest = max(map(abs, map(float, torch.aminmax(x.detach())))) if x.numel() else 0.0
        exponent = math.frexp(largest)[1] if math.isfinite(largest) and largest else 0
        return cls(max(-100, min(100, _digits(x.dtype) - HEADROOM_BITS - exponent)))

    def round(self, x: Tensor) -> Tensor:
        """`x` on the grid, halves to even; its gradient passes unchanged."""
        rounded = _Rounded.apply(x, self.bits)
        assert isinstance(rounded, Tensor)
        return rounded

    def holds(self, x: Tensor) -> Tensor:
        """Whether all of `x` is small enough for exact sums, as a tensor: a GPU is not waited for."""
        if not x.numel():
            return torch.ones((), dtype=torch.bool, device=x.device)
        # one pass; on a CPU the infinity norm takes 28 times as long. Neither comparison holds for a NaN
        low, high = torch.aminmax(x.detach())
        most = 2.0 ** (_digits(x.dtype) - self.bits)
        return (high < most) & (low > -most)

    def advance(
        self,
        weights: Weights,
        dropped_bits: int,
        previous: Tensor,
        current: Tensor,
        branch: Tensor,
        *,
        keep: bool,
    ) -> tuple[Tensor, ExactInverse]:
        """One step on the grid.

        Args:
            weights: Its coefficients.
            dropped_bits: k of |a| = 2^-k.
            previous: `x[i-1]`, on the grid.
            current: `x[i]`, on the grid.
            branch: `F_i(x[i])`.
            keep: Whether the inverse will be asked for; else it may be one that cannot answer.

        Returns:
            `x[i+1]` on the grid, and what takes it, `x[i]` and `F_i(x[i])` to `x[i-1]`.
        """
        change = self.change(weights, current, branch)
        if not isinstance(weights.a, Tensor) and weights.a in {0, 1}:
            total = previous + change if weights.a else change
            return total, ExactInverse(self, weights, None)
        share = weights.a * previous
        with torch.no_grad():
            cut = share * 2.0**self.bits
            cut -= cut.floor()
        packed = (
            _pack((cut * 2**dropped_bits).to(torch.uint8), dropped_bits) if keep and dropped_bits else None
        )
        total = (share - cut.mul_(2.0**-self.bits)) + change
        return total, ExactInverse(self, weights, packed)

    def change(self, weights: Weights, current: Tensor, branch: Tensor) -> Tensor:
        """`b * x[i] + c * F_i(x[i])`, rounded to the grid."""
        return self.round(weights.change(current, branch).to(current.dtype))


@dataclass(frozen=True, eq=False, slots=True)
class ExactInverse:
    """Takes a step on a grid back, bit for bit.

    Attributes:
        grid: The grid.
        weights: The coefficients of the step.
        packed: The bits of its input that the step dropped, if it dropped any.
    """

    grid: Grid
    weights: Weights
    packed: Packed | None

    def retreat(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i-1]` from `x[i+1]`, `x[i]` and `F_i(x[i])`."""
        share = following - self.grid.change(self.weights, current, branch)
        if not isinstance(self.weights.a, Tensor) and self.weights.a == 1:
            return share
        if self.packed is not None:
            share += self.packed.unpacked(share) * 2.0 ** -(self.grid.bits + self.packed.bits)
        # a power of two divides exactly; + 0 makes of -0, which no sum on the grid ever gives, 0 again
        return share.div_(self.weights.a).add_(0.0)


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """`bits` bits of every value of a tensor, 8 to a byte.

    Attributes:
        planes: One row for each bit, the lowest first: uint8, `(bits, ceil(values / 8))`.
        bits: How many there are of each value.
    """

    planes: Tensor
    bits: int

    def unpacked(self, like: Tensor) -> Tensor:
        """The values, as whole numbers in the shape, dtype and on the device of `like`."""
        shifts = torch.arange(8, device=self.planes.device, dtype=torch.uint8)[:, None]
        total = torch.zeros(like.numel(), device=like.device, dtype=like.dtype)
        for i, plane in enumerate(self.planes):
            bits = ((plane >> shifts) & 1).reshape(-1)[: like.numel()]
            total.add_(bits, alpha=2**i)
        return total.reshape(like.shape)


def _pack(values: Tensor, bits: int) -> Packed:
    """The low `bits` bits of a uint8 tensor."""
    flat = values.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(8, -1)
    planes = torch.zeros(bits, flat.shape[1], dtype=torch.uint8, device=flat.device)
    for i in range(bits):
        # neighbours in a byte are an eighth of the tensor apart: whole rows are shifted, which vectorises
        for j in range(8):
            planes[i] |= ((flat[j] >> i) & 1) << j
    return Packed(planes, bits)


Exact = bool | Grid


def exact_of(exact: bool | int | Grid, coupling: Coupling) -> Exact:
    """What `rewire(exact=...)` meant: False, True (the grid follows the entering values), or one grid for all.

    Raises:
        RewireError: the coupling cannot be exact, or there is no such grid.
    """
    if exact is False:
        return False
    dropped_bits(coupling)
    return exact if isinstance(exact, bool | Grid) else Grid(exact)


def dropped_bits(coupling: Coupling) -> int:
    """K of |a| = 2^-k: how many bits a value and step an exact chain keeps.

    Raises:
        RewireError: |a| is no such power of two; the message names the nearest.
    """
    size = abs(coupling.a)
    k = round(-math.log2(size)) if size else 0
    if not size or (size == 2.0**-k and 0 <= k <= _MOST_DROPPED_BITS):
        return k
    below = min(max(math.floor(math.log2(size)), -_MOST_DROPPED_BITS), 0)
    near = dict.fromkeys((2.0**below, 2.0 ** min(below + 1, 0)))
    # gamma = 1 leaves nothing of the branches
    allowed = [a for a in near if a < 1 or coupling.a_is != "gamma"]
    raise RewireError(
        f"{coupling.spec} cannot be exact: that takes {coupling.a_is} = 1, 1/2, 1/4, ... 1/256 (in size), so that what "
        f"a step drops is whole bits; the nearest: {' or '.join(f'{a:g}' for a in allowed)}"
    )


def _digits(dtype: torch.dtype) -> int:
    return 1 - round(math.log2(torch.finfo(dtype).eps))
