"""Layers over masked sequences (batch, channels, positions); the mask tells which positions lie within the video."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional

from examples.re2tal.heads.dialect import DIALECTS, Dialect

if TYPE_CHECKING:
    from torch import Tensor

OURS = DIALECTS["revwire"]


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of (batch, channels, positions)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class MaskedConv(nn.Module):
    """A convolution over time whose output is zero where the mask is; a stride takes the mask along.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Its size, odd.
        stride: From one output to the next.
        groups: Of channels.
        bias: Whether there is one.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        if bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` is (batch, positions of the output)."""
        return self.conv(x) * mask[:, None].to(x.dtype)


class LocalAttention(nn.Module):
    """Self-attention of ActionFormer: each position attends to those within a window around it.

    Queries, keys and values go through a depthwise convolution first, strided on the way to the next level.

    Args:
        channels: Of the sequence.
        heads: Of attention.
        window: How many positions one attends to, itself in the middle; odd. None: all.
        stride: From one position of the output to the next.
    """

    def __init__(self, channels: int, heads: int, window: int | None, stride: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.before = nn.ModuleList(
            MaskedConv(channels, channels, 3, stride=stride, groups=channels, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(3))
        self.inward = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.outward = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` is that of the output."""
        inward = zip(self.before, self.norms, self.inward, strict=True)
        # (batch, heads, positions, channels of a head)
        query, key, value = (
            into(norm(conv(x, mask))).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for conv, norm, into in inward
        )
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._allowed(mask))
        return self.outward(out.transpose(2, 3).flatten(1, 2)) * mask[:, None].to(x.dtype)

    def _allowed(self, mask: Tensor) -> Tensor:
        """(batch, 1, queries, keys) Who may look at whom."""
        place = torch.arange(mask.shape[1], device=mask.device)
        apart = (place[:, None] - place).abs()
        near = apart <= (mask.shape[1] if self.window is None else self.window // 2)
        # a position beyond the end may look at itself, because a softmax over nothing is not a number
        return ((near & mask[:, None, :]) | (apart == 0))[:, None]


class TransformerBlock(nn.Module):
    """A pre-norm transformer block; with a stride, its skip connection is a max pooling.

    Args:
        channels: Of the sequence.
        heads: Of attention.
        window: See `LocalAttention`.
        stride: 1, or 2 on the way to the next level.
        drop_path: Probability to leave a residual branch out, by sample.
        scale: What the branches' channels are scaled by at first (ActionFormer: 1e-4), learned; None: not at all.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int | None,
        *,
        stride: int = 1,
        drop_path: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))
        self.attention = LocalAttention(channels, heads, window, stride)
        self.mlp = nn.Sequential(
            nn.Conv1d(channels, 4 * channels, 1), nn.GELU(), nn.Conv1d(4 * channels, channels, 1)
        )
        self.drop_path = DropPath(drop_path)
        shape = (channels, 1)
        self.scales = nn.ParameterList(
            [] if scale is None else [nn.Parameter(torch.full(shape, scale)) for _ in range(2)]
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence and its mask, strided."""
        mask = mask[:, :: self.stride]
        skip = x if self.stride == 1 else functional.max_pool1d(x, 3, self.stride, 1)
        x = (skip + self._branch(0, self.attention(self.norms[0](x), mask))) * mask[:, None].to(x.dtype)
        x = x + self._branch(1, self.mlp(self.norms[1](x))) * mask[:, None].to(x.dtype)
        return x, mask

    def _branch(self, i: int, x: Tensor) -> Tensor:
        return self.drop_path(x * self.scales[i] if len(self.scales) else x)


class Positions(nn.Module):
    """Adds a table of sines and cosines, one vector of length about 1 a position (Vaswani et al., 2017).

    The table is not saved: it follows from its size.

    Args:
        channels: Of the sequence.
        length: Positions of the table; that of a longer sequence is interpolated from it.
    """

    table: Tensor

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        channel = torch.arange(channels, dtype=torch.float64)
        rate = 10000 ** (-2 * (channel // 2) / channels)
        angle = torch.arange(length, dtype=torch.float64) * rate[:, None]  # (channels, positions)
        table = torch.where(channel[:, None] % 2 == 0, angle.sin(), angle.cos())
        self.register_buffer("table", (table.float() / channels**0.5)[None], persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The same shape; nothing is added where the mask is zero."""
        table, length = self.table, x.shape[2]
        if length > table.shape[2]:
            table = functional.interpolate(table, length, mode="linear", align_corners=False)
        return x + table[:, :, :length] * mask[:, None].to(x.dtype)


class Projection(nn.Module):
    """From a backbone's channels to the head's: convolutions, each with normalization and ReLU.

    Args:
        inputs: Channels in.
        channels: Channels out.
        depth: How many convolutions.
        kernel: Their size, odd.
        dialect: What happens beyond the end.
    """

    def __init__(
        self, inputs: int, channels: int, depth: int = 2, kernel: int = 3, dialect: Dialect = OURS
    ) -> None:
        super().__init__()
        sizes = [inputs, *[channels] * depth]
        self.convs = nn.ModuleList(MaskedConv(a, b, kernel, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(ChannelNorm(channels, eps=dialect.eps) for _ in range(depth))
        self._masks = dialect.mask_activations

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, inputs, positions) to (batch, channels, positions)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x, mask)))
            if self._masks:
                x = x * mask[:, None].to(x.dtype)
        return x


class Tower(nn.Module):
    """What all levels share to make predictions: convolutions and a last one.

    Args:
        channels: Of the pyramid.
        outputs: Of each point.
        depth: Convolutions before the last.
        bias: What the last one's bias starts from.
        dialect: What happens beyond the end.
    """

    def __init__(self, channels: int, outputs: int, depth: int, bias: float, dialect: Dialect = OURS) -> None:
        super().__init__()
        self.body = Projection(channels, channels, depth, dialect=dialect)
        self.last = MaskedConv(channels, outputs, 3)
        nn.init.constant_(self.last.conv.bias, bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, positions, outputs); what stands beyond the end means nothing."""
        out: Tensor = self.last.conv(self.body(x, mask))
        return out.transpose(1, 2)
