"""A head that tells the class of actions whose place is given: what a backbone is fine-tuned with before detection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from examples.re2tal.heads.base import Losses

if TYPE_CHECKING:
    from torch import Tensor


class SegmentClassifier(nn.Module):
    """A linear layer on the mean of the features under each action."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(in_channels, classes)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002  # as any head is called
        """The features themselves: which of them belong together is only known with the actions."""
        return features

    def logits(self, features: Tensor, segments: list[Tensor]) -> Tensor:
        """(actions of all clips, classes) from (batch, channels, positions) and (actions, 2) of each clip."""
        place = torch.arange(features.shape[2], device=features.device) + 0.5
        means = []
        for clip, own in zip(features.float(), segments, strict=True):
            inside = (place > own[:, :1].floor()) & (place < own[:, 1:].ceil())
            weights = inside.float() / inside.sum(dim=1, keepdim=True).clamp(min=1)
            means.append(weights @ clip.T)
        logits: Tensor = self.classify(torch.cat(means))
        return logits

    def loss(self, features: Tensor, segments: list[Tensor], labels: list[Tensor]) -> Losses:
        """Cross-entropy of the classes of all actions."""
        logits = self.logits(features, segments)
        loss = functional.cross_entropy(logits, torch.cat(labels), reduction="sum") / max(1, len(logits))
        return Losses(loss, loss, torch.zeros_like(loss))
