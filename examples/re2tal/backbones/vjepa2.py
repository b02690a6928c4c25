"""V-JEPA 2 (Assran et al., 2025) from transformers: rotary positions, so any even number of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from examples.re2tal.backbones.base import Backbone, needs

if TYPE_CHECKING:
    from torch import Tensor


class VJEPA2(Backbone):
    """The encoder without the predictor, then the mean over space; half as many steps as pictures."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.channels: int = model.config.hidden_size
        self.tubelet: int = model.config.tubelet_size

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        tokens = self.encoder(clip.transpose(1, 2)).last_hidden_state
        return torch.mean(tokens.unflatten(1, (clip.shape[2] // self.tubelet, -1)), dim=2).transpose(1, 2)


def build(_: str, *, weights: str | None, size: int = 256, **options: Any) -> VJEPA2:
    """`vjepa2_l`; `weights` is a model of the hub such as `facebook/vjepa2-vitl-fpc64-256`."""
    transformers = needs("transformers")
    if weights is not None:
        return VJEPA2(transformers.VJEPA2Model.from_pretrained(weights, **options))
    return VJEPA2(transformers.VJEPA2Model(transformers.VJEPA2Config(crop_size=size, **options)))
