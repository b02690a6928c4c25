"""Losses of a detection head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchvision.ops import sigmoid_focal_loss

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the focal loss (Lin et al., 2017) of `logits` (any shape) against `targets` from 0 to 1."""
    loss: Tensor = sigmoid_focal_loss(logits.float(), targets, alpha=alpha, gamma=gamma, reduction="sum")
    return loss


def diou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Sum of `1 - IoU + (distance of the centres / length of the hull)**2` (Zheng et al., 2020, in one dimension).

    Args:
        predicted: (points, 2) Distances to start and end, not negative.
        wanted: (points, 2) The same of the actions.
    """
    predicted = predicted.float()
    overlap = torch.minimum(predicted, wanted).sum(dim=-1)
    hull = torch.maximum(predicted, wanted).sum(dim=-1).clamp(min=_EPSILON)
    union = (predicted.sum(dim=-1) + wanted.sum(dim=-1) - overlap).clamp(min=_EPSILON)
    apart = 0.5 * ((predicted[:, 1] - predicted[:, 0]) - (wanted[:, 1] - wanted[:, 0]))
    return (1 - overlap / union + (apart / hull) ** 2).sum()
