"""The pyramid that both heads have: blocks at full length, then levels that are each half as fine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from examples.re2tal.heads.layers import OURS, ChannelNorm, Positions, Projection

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from examples.re2tal.heads.dialect import Dialect


class Pyramid(nn.Module):
    """Projection, `stem` blocks, and one strided block for each further level.

    Args:
        inputs: Channels of the features.
        channels: Of all levels.
        levels: How many, the finest included.
        stem: Blocks before the finest level.
        block: Makes a block of a stride, from a sequence and its mask to the same.
        projection: Convolutions of the projection.
        kernel: Their size.
        positions: Length of the table that tells positions apart (see `Positions`); None: there is none.
        dialect: What happens beyond the end.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        levels: int,
        stem: int,
        block: Callable[[int], nn.Module],
        *,
        projection: int = 2,
        kernel: int = 3,
        positions: int | None = None,
        dialect: Dialect = OURS,
    ) -> None:
        super().__init__()
        self.projection = Projection(inputs, channels, projection, kernel, dialect)
        self.positions = None if positions is None else Positions(channels, positions)
        self.stem = nn.ModuleList(block(1) for _ in range(stem))
        self.down = nn.ModuleList(block(2) for _ in range(levels - 1))
        self.norms = nn.ModuleList(ChannelNorm(channels, eps=dialect.eps) for _ in range(levels))

    def forward(self, x: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """From (batch, inputs, positions) and its mask to the levels, finest first, each with its mask."""
        x = self.projection(x, mask)
        if self.positions is not None:
            x = self.positions(x, mask)
        for block in self.stem:
            x, mask = block(x, mask)
        levels = [(x, mask)]
        for block in self.down:
            levels.append(block(*levels[-1]))
        return [(norm(x), mask) for (x, mask), norm in zip(levels, self.norms, strict=True)]
