"""The whole model: from the pictures of a clip to what happens in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.re2tal.backbones.base import at_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from examples.re2tal.data.dataset import Batch
    from examples.re2tal.heads.base import Head, Losses, Predictions

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast runs a detector in, by the setting `optim.amp`."""


_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Detector(nn.Module):
    """Backbone and head.

    Args:
        backbone: From clips (batch, 3, frames, height, width) to features (batch, channels, steps), or the
            features of several pathways, which are joined. One that has nothing to train stays in evaluation mode.
        head: From features (batch, channels, positions) to predictions.
        positions: How many the head is given; features of fewer or more steps are interpolated, each pathway's on
            their own.
        mean: Of the pixels of each colour, from 0 to 1.
        std: Their standard deviation.
        freeze_batch_norm: The backbone's BatchNorms keep their statistics and weights, as a pretrained one's do when
            batches are small.
        freeze_norms: So do all norms of the backbone, LayerNorm and GroupNorm, too (OpenTAD's `norm_eval`).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        *,
        positions: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        freeze_batch_norm: bool = False,
        freeze_norms: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.positions = backbone, head, positions
        kinds = _NORMS if freeze_norms else (_BatchNorm,) if freeze_batch_norm else ()
        self._frozen = [module for module in backbone.modules() if isinstance(module, kinds)]
        for module in self._frozen:
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            self._frozen = [backbone]
        self.train(self.training)
        for name, values in (("mean", mean), ("std", std)):
            of_bytes = torch.tensor([255 * value for value in values]).reshape(3, 1, 1, 1)
            self.register_buffer(name, of_bytes, persistent=False)

    def forward(self, frames: Tensor, mask: Tensor) -> Predictions:
        """Predictions from `frames` (batch, frames, 3, height, width), uint8, and `mask` (batch, positions)."""
        predictions: Predictions = self.head(self.features(frames), mask)
        return predictions

    def train(self, mode: bool = True) -> Detector:
        """As for any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def features(self, frames: Tensor) -> Tensor:
        """(batch, channels, positions)."""
        clip = (frames.transpose(1, 2) - self.mean) / self.std
        return at_positions(self.backbone(clip), self.positions)

    def loss(self, batch: Batch) -> Losses:
        """The losses of a batch; its forward runs through `self`, as wrappers of this module need."""
        return self.head.loss(self(batch.frames, batch.mask), batch.segments, batch.labels)


@dataclass(frozen=True)
class Candidates:
    """What may happen in one clip, before any of it is thrown away as a repetition.

    Attributes:
        segments: (candidates, 2) Starts and ends, in positions.
        scores: (candidates,) From 0 to 1, the best first.
        labels: (candidates,) Indices of classes.
    """

    segments: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]


def candidates(predictions: Predictions, *, threshold: float = 0.001, topk: int = 2000) -> list[Candidates]:
    """The best pairs of point and class of each clip, at most `topk`, of a score above `threshold`.

    Segments may reach beyond the clip: an action that a window shows a part of is found as long as it is, and
    `TimeGrid.seconds` cuts it to the video.
    """
    scores = predictions.logits.float().sigmoid() * predictions.mask[..., None]
    segments = predictions.segments()
    found = []
    for clip_scores, clip_segments in zip(scores, segments, strict=True):
        best, order = clip_scores.flatten().sort(descending=True, stable=True)
        count = min(topk, int((best > threshold).sum()))
        order, best = order[:count], best[:count]
        classes = clip_scores.shape[1]
        chosen = clip_segments[order // classes].double()
        found.append(
            Candidates(chosen.cpu().numpy(), best.double().cpu().numpy(), (order % classes).cpu().numpy())
        )
    return found
