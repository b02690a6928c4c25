"""The moments at which the head looks for actions: one for each position of each level of its pyramid.

Level `l` has every `2**l`-th position. Each level answers for actions whose farther end is within a range of it, so
that short actions are found on fine levels and long ones on coarse ones (FCOS; ActionFormer, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_FIRST = 4.0
_ENDLESS = 10000.0


@dataclass(frozen=True)
class Points:
    """All levels after one another; every field is (points,) float32, in positions of level 0.

    Attributes:
        position: Where each is.
        stride: How far apart those of its level are.
        low: An action belongs to it if its farther end is at least this far away,
        high: and at most this far.
    """

    position: Tensor
    stride: Tensor
    low: Tensor
    high: Tensor

    def __len__(self) -> int:
        """How many there are."""
        return len(self.position)

    def segments(self, offsets: Tensor) -> Tensor:
        """Starts and ends (..., points, 2) in positions, from distances to them (..., points, 2) in strides."""
        offsets = offsets * self.stride[:, None]
        return torch.stack([self.position - offsets[..., 0], self.position + offsets[..., 1]], dim=-1)


def ranges(levels: int) -> list[tuple[float, float]]:
    """The ranges of ActionFormer: 0 to 4, 4 to 8, 8 to 16, ..., the last without end."""
    bounds = [0.0, *(_FIRST * 2**i for i in range(levels - 1)), _ENDLESS]
    return list(pairwise(bounds))


def points_of(
    positions: int,
    levels: int,
    device: torch.device | str = "cpu",
    bounds: Sequence[tuple[float, float]] | None = None,
) -> Points:
    """The points of a clip whose finest level has so many positions; `bounds` are `ranges(levels)` if not given."""
    columns = []
    for level, (low, high) in enumerate(ranges(levels) if bounds is None else bounds):
        stride = 2**level
        position = torch.arange(0, positions, stride, dtype=torch.float32, device=device)
        columns.append(
            torch.stack([position, *(torch.full_like(position, v) for v in (float(stride), low, high))])
        )
    return Points(*torch.cat(columns, dim=1))
