"""SlowFast (Feichtenhofer et al., ICCV 2019) by pytorchvideo's definition, which is an optional source.

Two pathways: one sees every fourth picture, the other all of them with an eighth of the channels, and is joined to the
first between the stages by lateral convolutions. Rewired, each pathway's blocks of a stage are one chain but for the
first, which changes the shape; laterals and stage ends see the merged tensor, as in Re2TAL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from examples.re2tal.backbones.base import Backbone, needs
from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from torch import Tensor

_ALPHA = 4
_DEPTHS = {"slowfast_r50": 50, "slowfast_r101": 101}


class SlowFast(Backbone):
    """Stem and four stages; both pathways' features, a quarter as many steps as pictures.

    Args:
        model: pytorchvideo's network.
    """

    mean = (0.45, 0.45, 0.45)
    std = (0.225, 0.225, 0.225)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[:5])
        self.channels = 2048 + 256

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        paths = [clip[:, :, ::_ALPHA], clip]
        for block in self.blocks:
            paths = block(paths)
        slow, fast = (torch.mean(path, dim=(3, 4)) for path in paths)
        return torch.cat([slow, functional.avg_pool1d(fast, _ALPHA)], dim=1)


def build(name: str, *, weights: str | None, **options: Any) -> SlowFast:
    """`slowfast_r50` or `slowfast_r101`, of 8x8 pictures; weights from a file."""
    if weights is not None:
        raise Re2TALError(f"{name} takes its weights from a file (.pth or .safetensors), not {weights!r}")
    create = needs("pytorchvideo.models.slowfast").create_slowfast
    shape = {"slowfast_channel_reduction_ratio": (8,), "slowfast_conv_channel_fusion_ratio": 2}
    return SlowFast(create(model_depth=_DEPTHS[name], **shape, **options))
