"""Video Swin (Liu et al., CVPR 2022) from torchvision: any number of pictures of any size; half as many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchvision.models import video

from examples.re2tal.backbones.base import Backbone

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.models.video.swin_transformer import SwinTransformer3d


class VideoSwin(Backbone):
    """The stages and the last norm, then the mean over space."""

    def __init__(self, model: SwinTransformer3d) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.features, self.norm = model.features, model.norm
        self.channels = model.num_features

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        x = self.norm(self.features(self.pos_drop(self.patch_embed(clip))))  # (B, T, H, W, C)
        return torch.mean(x, dim=(2, 3)).transpose(1, 2)


def build(name: str, *, weights: str | None, **options: Any) -> VideoSwin:
    """One of `swin3d_t`, `swin3d_s`, `swin3d_b`; `weights` such as `KINETICS400_V1`."""
    return VideoSwin(getattr(video, name)(weights=weights, **options))
