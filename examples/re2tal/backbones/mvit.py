"""MViTv2-S (Li et al., CVPR 2022) from torchvision, which takes 16 pictures of 224 x 224 and nothing else.

A longer clip goes through it in pieces of 16 pictures, as in AdaTAD; each piece makes 8 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.models import video

from examples.re2tal.backbones.base import Backbone, pieces, rejoined

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.models.video.mvit import MViT

SIZES: dict[str, dict[str, Any]] = {"mvit_v2_s": {}}
"""By name: the options that say how large it is; there is one size."""


class _Tokens(nn.Module):
    """The network without its head: (batch, 3, 16, height, width) to the mean over space of its last tokens."""

    def __init__(self, model: MViT) -> None:
        super().__init__()
        self.conv_proj, self.pos_encoding = model.conv_proj, model.pos_encoding
        self.blocks, self.norm = model.blocks, model.norm

    def forward(self, clip: Tensor) -> Tensor:
        x = self.pos_encoding(self.conv_proj(clip).flatten(2).transpose(1, 2))
        size = (self.pos_encoding.temporal_size, *self.pos_encoding.spatial_size)
        for block in self.blocks:
            x, size = block(x, size)
        tokens = self.norm(x)[:, 1:]  # the first one stands for the class
        return torch.mean(tokens.unflatten(1, (size[0], -1)), dim=2).transpose(1, 2)


class MViTv2(Backbone):
    """See the module; `mean` and `std` are those of its weights."""

    mean = (0.45, 0.45, 0.45)
    std = (0.225, 0.225, 0.225)

    def __init__(self, model: MViT) -> None:
        super().__init__()
        patch = model.conv_proj.stride
        self.size = [n * s for n, s in zip(model.pos_encoding.spatial_size, patch[1:], strict=True)]
        self.frames = model.pos_encoding.temporal_size * patch[0]
        self.channels = model.norm.normalized_shape[0]
        self.tokens = _Tokens(model)

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        return rejoined(self.tokens(pieces(clip, self.frames, self.size)), len(clip))


def build(name: str, *, weights: str | None, **options: Any) -> MViTv2:
    """`mvit_v2_s`; `weights` such as `KINETICS400_V1`."""
    return MViTv2(getattr(video, name)(weights=weights, **options))
