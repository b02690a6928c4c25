"""VideoMAE (Tong et al., NeurIPS 2022) from transformers, whose table of positions is for 16 pictures.

A longer clip goes through it in pieces of 16 pictures, as in AdaTAD; each piece makes 8 steps. For pictures of another
size than it was trained on, the table is interpolated, as mmaction2 does; transformers would compute another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from examples.re2tal.backbones.base import Backbone, needs, pieces, rejoined

if TYPE_CHECKING:
    from torch import Tensor

_PATCHES = {"tubelet_size": 2, "patch_size": 16}
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        **_PATCHES,
    }
    for name, width, layers, heads in (
        ("videomae_s", 384, 12, 6),
        ("videomae_b", 768, 12, 12),
        ("videomae_l", 1024, 24, 16),
    )
}
"""By name: the options that say how large it is."""

_EPS = 1e-6  # what the weights were trained with, whose configurations for transformers say 1e-12


class VideoMAE(Backbone):
    """The encoder, then the mean over space.

    Args:
        model: transformers' `VideoMAEModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.model = model
        # transformers keeps the table as a plain attribute, which does not move to the GPU with the model
        table = vars(model.embeddings).pop("position_embeddings", None)
        if table is not None:
            model.embeddings.register_buffer("position_embeddings", table, persistent=False)
        self.channels: int = config.hidden_size
        self.frames, side = config.num_frames, config.image_size // config.patch_size
        self.grid = (config.num_frames // config.tubelet_size, side, side)

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        return torch.mean(self.map(clip), dim=(3, 4))

    def map(self, clip: Tensor) -> Tensor:
        """The last map, (batch, channels, frames / 2, height / 16, width / 16)."""
        patches = self.model.embeddings.patch_embeddings.projection(pieces(clip, self.frames))
        tokens = patches.flatten(2).transpose(1, 2) + self._positions(patches)
        tokens = self.model.encoder(tokens).last_hidden_state
        if self.model.layernorm is not None:
            tokens = self.model.layernorm(tokens)
        return rejoined(tokens.transpose(1, 2).reshape(patches.shape), len(clip))

    def _positions(self, patches: Tensor) -> Tensor:
        """(1, tokens, channels) For the heights and widths that these patches (batch, channels, *grid) have."""
        table: Tensor = self.model.embeddings.position_embeddings
        if patches.shape[3:] != self.grid[1:]:
            planes = table.reshape(*self.grid, -1).permute(0, 3, 1, 2)  # (time, channels, height, width)
            resized = functional.interpolate(planes, patches.shape[3:], mode="bicubic", align_corners=False)
            table = resized.permute(0, 2, 3, 1).flatten(0, 2)[None]
        return table.to(patches.dtype)


def build(
    name: str, *, weights: str | None, size: int = 224, trained_size: int | None = None, **options: Any
) -> VideoMAE:
    """`videomae_s`, `_b` or `_l`; `weights` names a model of the hub: `MCG-NJU/videomae-base-finetuned-kinetics`.

    Args:
        name: Which sizes it has, where `options` say nothing else.
        weights: A model of the hub.
        size: Height and width of the pictures; of those that its table of positions is for if `trained_size` does not
            say. Clips may have pictures of any size.
        trained_size: Height and width of the pictures that its weights were trained on.
        options: Of transformers' `VideoMAEConfig`; with `use_mean_pooling=False` there is a norm after the last block.
    """
    transformers = needs("transformers")
    # as in AdaTAD: no norm after the last block, where the classifier pools and then has a norm of its own
    options = {"layer_norm_eps": _EPS, "use_mean_pooling": True, **options}
    if weights is not None:
        return VideoMAE(transformers.VideoMAEModel.from_pretrained(weights, **options))
    settings = {**SIZES[name], "image_size": trained_size or size, **options}
    return VideoMAE(transformers.VideoMAEModel(transformers.VideoMAEConfig(**settings)))
