"""Video Swin (Liu et al., CVPR 2022) from torchvision: any number of pictures of any size; half as many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchvision.models import get_model_weights
from torchvision.models.video.swin_transformer import SwinTransformer3d

from examples.re2tal.backbones.base import Backbone
from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from torch import Tensor

_PATCHES = {"patch_size": (2, 4, 4), "window_size": (8, 7, 7)}
SIZES: dict[str, dict[str, Any]] = {
    "swin3d_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), **_PATCHES},
    "swin3d_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), **_PATCHES},
    "swin3d_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), **_PATCHES},
}
"""By name: the options that say how large it is."""


class VideoSwin(Backbone):
    """The stages and the last norm, then the mean over space."""

    def __init__(self, model: SwinTransformer3d) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.features, self.norm = model.features, model.norm
        self.channels = model.num_features

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        return torch.mean(self.map(clip), dim=(3, 4))

    def map(self, clip: Tensor) -> Tensor:
        """The last map, (batch, channels, frames / 2, height / 32, width / 32), rounded up."""
        x = self.norm(self.features(self.pos_drop(self.patch_embed(clip))))  # (B, T, H, W, C)
        return x.permute(0, 4, 1, 2, 3)  # type: ignore[no-any-return]


def build(name: str, *, weights: str | None, **options: Any) -> VideoSwin:
    """One of `swin3d_t`, `swin3d_s`, `swin3d_b`; `weights` such as `KINETICS400_V1`.

    Args:
        name: Which sizes it has, where `options` say nothing else.
        weights: torchvision's name of its weights.
        options: Of torchvision's `SwinTransformer3d`: `embed_dim`, `depths`, `num_heads`, `window_size`,
            `stochastic_depth_prob`...

    Raises:
        Re2TALError: torchvision has no such weights.
    """
    settings = {**SIZES[name], **options}
    lists = {
        key: list(value) if isinstance(value, (list, tuple)) else value for key, value in settings.items()
    }
    model = SwinTransformer3d(**lists)
    if weights is not None:
        there = get_model_weights(name)
        if weights not in there.__members__:
            raise Re2TALError(
                f"torchvision has no weights {weights!r} of {name}; there are {', '.join(there.__members__)}"
            )
        model.load_state_dict(there[weights].get_state_dict(progress=False, check_hash=True))
    return VideoSwin(model)
