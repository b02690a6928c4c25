"""Scikit-learn's handwritten digits: loading, the fixed split, augmentation, evaluation.

1797 images of 8x8 pixels with 16 grey levels come with scikit-learn itself (a part of the UCI set "Optical
recognition of handwritten digits"), so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 8  # pixels a side
CLASSES = 10
_GREYS = 16.0
_BACKGROUND = -1.0  # what an empty pixel becomes in `load`


@dataclass(frozen=True)
class Part:
    """Images and labels of one part of the data.

    Attributes:
        images: `(count, 1, 8, 8)`, float32, from -1 (paper) to 1 (ink).
        labels: `(count,)`, int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """The two parts of the data: three quarters to train on, one quarter to test on."""

    train: Part
    test: Part


def load() -> Digits:
    """Load the digits and split them, always the same way, every digit in the same share of both parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / (_GREYS / 2) - 1  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return Digits(Part(images[train], labels[train]), Part(images[test], labels[test]))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift every image a little, each by its own draw.

    Args:
        images: `(batch, 1, 8, 8)`.
        generator: Where the draws come from.

    Returns:
        `(batch, 1, 8, 8)`, new images; what moves in from outside is paper.
    """
    count = len(images)

    def draw(bound: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * bound

    angle, scale, shear = draw(0.2), 1 + draw(0.1), draw(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    linear = torch.stack([cos, shear - sin, sin, cos], dim=1).view(count, 2, 2)
    shift = draw(2 / SIZE, 2, 1)  # one pixel: the grid runs from -1 to 1
    theta = torch.cat([linear, shift], dim=2)  # (batch, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images - _BACKGROUND, grid, align_corners=False)
    return moved + _BACKGROUND


def batches(part: Part, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches in a fresh order; the last, smaller batch is left out.

    Args:
        part: The images and labels to draw from.
        size: Images in a batch.
        generator: Where order and augmentation come from.

    Yields:
        `(size, 1, 8, 8)` images and their `(size,)` labels.
    """
    order = torch.randperm(len(part.labels), generator=generator)
    for chosen in order.split(size):
        if len(chosen) == size:
            yield augment(part.images[chosen], generator), part.labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of the images whose digit the model gets right, in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        found = model(part.images).argmax(dim=1)
    finally:
        model.train(training)
    return float((found == part.labels).float().mean())
