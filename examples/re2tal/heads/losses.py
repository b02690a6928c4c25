"""Losses of a detection head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchvision.ops import sigmoid_focal_loss

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-7


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the focal loss (Lin et al., 2017) of `logits` (any shape) against `targets` from 0 to 1."""
    logits = logits.float()
    targets = targets.to(logits.dtype)
    loss: Tensor = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="sum")
    return loss


def diou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Sum of `1 - IoU + (distance of the centres / length of the hull)**2` (Zheng et al., 2020, in one dimension).

    Args:
        predicted: (points, 2) Starts and ends; no end before its start.
        wanted: (points, 2) The same of the actions.
    """
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))  # not in half precision
    start, end = torch.maximum(predicted, wanted)[:, 0], torch.minimum(predicted, wanted)[:, 1]
    overlap = (end - start).clamp(min=0)
    lengths = (predicted[:, 1] - predicted[:, 0]) + (wanted[:, 1] - wanted[:, 0])
    hull = torch.maximum(predicted, wanted)[:, 1] - torch.minimum(predicted, wanted)[:, 0]
    apart = (predicted.sum(dim=1) - wanted.sum(dim=1)) / 2
    union = (lengths - overlap).clamp(min=_EPSILON)
    return (1 - overlap / union + apart**2 / (hull**2).clamp(min=_EPSILON)).sum()
