"""The pyramid that both heads have: blocks at full length, then levels that are each half as fine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from examples.re2tal.heads.layers import ChannelNorm, Projection

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Pyramid(nn.Module):
    """Projection, `stem` blocks, and one strided block for each further level.

    Args:
        inputs: Channels of the features.
        channels: Of all levels.
        levels: How many, the finest included.
        stem: Blocks before the finest level.
        block: Makes a block of a stride, from a sequence and its mask to the same.
    """

    def __init__(
        self, inputs: int, channels: int, levels: int, stem: int, block: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.projection = Projection(inputs, channels)
        self.stem = nn.ModuleList(block(1) for _ in range(stem))
        self.down = nn.ModuleList(block(2) for _ in range(levels - 1))
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(levels))

    def forward(self, x: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """From (batch, inputs, positions) and its mask to the levels, finest first, each with its mask."""
        x = self.projection(x, mask)
        for block in self.stem:
            x, mask = block(x, mask)
        levels = [(x, mask)]
        for block in self.down:
            levels.append(block(*levels[-1]))
        return [(norm(x), mask) for (x, mask), norm in zip(levels, self.norms, strict=True)]
