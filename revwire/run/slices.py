"""How a trunk is cut into slices, on which a branch runs one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """How a branch is run slice by slice: its samples, or positions that it treats alike, do not know of each other.

    Attributes:
        dim: The dimension of the trunk that is cut.
        number: Into how many slices, of equal size but for the last.
        sides: Whether each side input is cut along its first dimension too.
    """

    dim: int
    number: int
    sides: tuple[bool, ...]

    def count(self, shape: Sequence[int]) -> int:
        """How many slices a trunk of this shape makes: fewer than `number` where it is shorter."""
        return -(-shape[self.dim] // -(-shape[self.dim] // self.number))

    def of(self, x: Tensor) -> Sequence[Tensor]:
        """All slices of a trunk."""
        return x.chunk(self.number, self.dim)

    def one(self, x: Tensor, index: int) -> Tensor:
        """One slice of a trunk, without making a view of each of the others."""
        size = -(-x.shape[self.dim] // self.number)
        return x.narrow(self.dim, index * size, min(size, x.shape[self.dim] - index * size))

    def of_sides(self, sides: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The side inputs of each slice."""
        both = zip(sides, self.sides, strict=True)
        cut = [side.chunk(self.number) if is_cut else (side,) * self.number for side, is_cut in both]
        # a size that the number of slices does not go into may make fewer of them
        return list(zip(*cut, strict=False)) if cut else [()] * self.number
