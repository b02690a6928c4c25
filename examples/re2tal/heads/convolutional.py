"""A head without attention: a pyramid of residual convolutions over time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional

from examples.re2tal.heads.base import Head
from examples.re2tal.heads.layers import ChannelNorm, MaskedConv
from examples.re2tal.heads.pyramid import Pyramid

if TYPE_CHECKING:
    from torch import Tensor


class ConvBlock(nn.Module):
    """Two convolutions beside a skip connection, which is a max pooling where there is a stride."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))
        self.convs = nn.ModuleList(
            MaskedConv(channels, channels, 3, stride=s, bias=False) for s in (stride, 1)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence and its mask, strided."""
        after = mask[:, :: self.stride]
        skip = x if self.stride == 1 else functional.max_pool1d(x, 3, self.stride, 1)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(functional.relu(norm(x)), after)
        return (skip + x) * after[:, None].to(x.dtype), after


def build(
    in_channels: int, classes: int, *, channels: int = 512, levels: int = 6, stem: int = 2, **options: Any
) -> Head:
    """The head. See `Pyramid` and `Head`."""
    pyramid = Pyramid(in_channels, channels, levels, stem, partial(ConvBlock, channels))
    return Head(pyramid, channels=channels, classes=classes, levels=levels, **options)
