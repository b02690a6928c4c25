"""VideoMAE (Tong et al., NeurIPS 2022) from transformers, whose table of positions is for 16 pictures.

A longer clip goes through it in pieces of 16 pictures, as in AdaTAD; each piece makes 8 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from examples.re2tal.backbones.base import Backbone, needs, pieces, rejoined

if TYPE_CHECKING:
    from torch import Tensor

_SIZES: dict[str, dict[str, int]] = {
    "videomae_s": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
    "videomae_b": {},
    "videomae_l": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


class VideoMAE(Backbone):
    """The encoder, then the mean over space."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.model = model
        # transformers keeps the table as a plain attribute, which does not move to the GPU with the model
        table = vars(model.embeddings).pop("position_embeddings", None)
        if table is not None:
            model.embeddings.register_buffer("position_embeddings", table, persistent=False)
        self.channels: int = config.hidden_size
        self.frames, self.size = config.num_frames, [config.image_size] * 2
        self.steps = config.num_frames // config.tubelet_size

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        parts = pieces(clip, self.frames, self.size)
        tokens = self.model(parts.transpose(1, 2)).last_hidden_state
        over_time = torch.mean(tokens.unflatten(1, (self.steps, -1)), dim=2).transpose(1, 2)
        return rejoined(over_time, len(clip))


def build(name: str, *, weights: str | None, size: int = 224, **options: Any) -> VideoMAE:
    """`videomae_s`, `_b` or `_l`; `weights` names a model of the hub: `MCG-NJU/videomae-base-finetuned-kinetics`."""
    transformers = needs("transformers")
    settings = {**_SIZES[name], "image_size": size, "use_mean_pooling": False, **options}
    if weights is not None:
        return VideoMAE(transformers.VideoMAEModel.from_pretrained(weights, image_size=size, **options))
    return VideoMAE(transformers.VideoMAEModel(transformers.VideoMAEConfig(**settings)))
