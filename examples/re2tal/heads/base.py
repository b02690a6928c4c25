"""What all detection heads are: from features over time to scored segments, and from those to losses.

A head is a *pyramid*, which makes sequences of ever coarser positions out of the features, and two *towers* that all
levels share: one tells the classes at each point, the other how far the action's start and end are from it
(ActionFormer, ECCV 2022). Heads differ in their pyramid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.assignment import RADIUS, assign
from examples.re2tal.heads.layers import OURS, Tower
from examples.re2tal.heads.losses import diou_loss, focal_loss
from examples.re2tal.heads.points import Points, points_of, ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from examples.re2tal.heads.dialect import Dialect


@dataclass
class Predictions:
    """What a head says of a batch of clips.

    Attributes:
        logits: (batch, points, classes).
        offsets: (batch, points, 2) How far start and end are, in strides of the point's level, not negative.
        points: Where the points are.
        mask: (batch, points) Which points lie within the video.
    """

    logits: Tensor
    offsets: Tensor
    points: Points
    mask: Tensor

    def segments(self) -> Tensor:
        """(batch, points, 2) Starts and ends in positions, also beyond those of the clip."""
        return self.points.segments(self.offsets)


@dataclass
class Losses:
    """Scalars; `total` is what is minimized."""

    total: Tensor
    classification: Tensor
    regression: Tensor


class Head(nn.Module):
    """Pyramid and towers.

    Args:
        pyramid: Makes the levels.
        channels: Of every level.
        classes: How many there are; 1 for a head that only tells action from background.
        levels: How many the pyramid makes.
        depth: Convolutions of a tower before the last.
        normalizer: What the losses are divided by at first; in training it follows the number of points that have an
            action to find (ActionFormer: 100 for THUMOS-14, 200 for ActivityNet). In evaluation that number itself is
            taken.
        momentum: How much of the normalizer is kept at each step.
        label_smoothing: What is taken from the wanted classes and spread over all.
        loss_weight: Of the regression's loss (OpenTAD: 1 for THUMOS-14, 2 for ActivityNet).
        radius: See `assign`.
        bounds: Nearest and farthest ends of actions that each level answers for; ActionFormer's if not given.
        prior: The probability of a class that the head starts from, as most points have nothing to find.
        dialect: What happens beyond the end of a video, see `Dialect`.

    Raises:
        Re2TALError: `bounds` are not as many as there are levels.
    """

    normalizer: Tensor

    def __init__(
        self,
        pyramid: nn.Module,
        *,
        channels: int,
        classes: int,
        levels: int,
        depth: int = 2,
        normalizer: float = 100.0,
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        loss_weight: float = 1.0,
        radius: float = RADIUS,
        bounds: Sequence[tuple[float, float]] | None = None,
        prior: float = 0.01,
        dialect: Dialect = OURS,
    ) -> None:
        super().__init__()
        self.pyramid, self.classes, self.levels = pyramid, classes, levels
        self.momentum, self.label_smoothing, self.loss_weight = momentum, label_smoothing, loss_weight
        self.radius, self._zero_features = radius, dialect.zero_features
        self.bounds = ranges(levels) if bounds is None else list(bounds)
        if len(self.bounds) != levels:
            raise Re2TALError(
                f"head.options.bounds are {len(self.bounds)}; give one pair for each of {levels} levels"
            )
        self.classify = Tower(channels, classes, depth, -math.log((1 - prior) / prior), dialect)
        # distances go through a ReLU: with a bias of zero half of them would begin below it, without a gradient
        self.regress = Tower(channels, 2, depth, 1.0, dialect)
        self.scales = nn.Parameter(torch.ones(levels))
        self.register_buffer("normalizer", torch.tensor(float(normalizer)))

    def forward(self, features: Tensor, mask: Tensor) -> Predictions:
        """Predictions from (batch, channels, positions), of which `mask` (batch, positions) lie within the video.

        Raises:
            Re2TALError: the positions cannot be halved as often as there are levels.
        """
        positions, coarsest = features.shape[2], 2 ** (self.levels - 1)
        if positions % coarsest:
            raise Re2TALError(
                f"{positions} positions do not divide by {coarsest}, the stride of the coarsest of {self.levels} "
                "levels; change clip.positions or head.levels"
            )
        if self._zero_features:
            features = features * mask[:, None].to(features.dtype)
        levels = self.pyramid(features, mask)
        logits = torch.cat([self.classify(x, m) for x, m in levels], dim=1)
        offsets = torch.cat(
            [
                torch.relu(self.regress(x, m) * scale)
                for (x, m), scale in zip(levels, self.scales, strict=True)
            ],
            dim=1,
        )
        valid = torch.cat([m for _, m in levels], dim=1)
        points = points_of(positions, self.levels, features.device, self.bounds)
        return Predictions(logits, offsets, points, valid)

    def loss(self, predictions: Predictions, segments: list[Tensor], labels: list[Tensor]) -> Losses:
        """Losses against the actions of each clip: segments (actions, 2) in positions, labels (actions,)."""
        pairs = [
            assign(predictions.points, s, k, self.classes, self.radius)
            for s, k in zip(segments, labels, strict=True)
        ]
        targets = torch.stack([target for target, _ in pairs])
        distances = torch.stack([distance for _, distance in pairs])
        positive = (targets.sum(dim=2) > 0) & predictions.mask
        count = positive.sum().clamp(min=1).to(self.normalizer.dtype)
        if self.training:
            self.normalizer.lerp_(count, 1 - self.momentum)
            # a copy: the buffer changes again at the next batch, maybe before this one's backward
            count = self.normalizer.clone()
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / (self.classes + 1)
        valid = predictions.mask
        classification = focal_loss(predictions.logits[valid], targets[valid]) / count
        found, wanted = predictions.segments()[positive], predictions.points.segments(distances)[positive]
        regression = self.loss_weight * diou_loss(found, wanted) / count
        return Losses(classification + regression, classification, regression)
