"""What all backbones are, and what several of them use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels of each colour."""


class Backbone(nn.Module):
    """From clips (batch, 3, frames, height, width), normalised, to features (batch, channels, steps).

    Attributes:
        channels: How many features a step has.
        mean: Of the pixels of each colour, from 0 to 1, in the data it was trained on.
        std: Their standard deviation.
    """

    channels: int
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        raise NotImplementedError


def needs(package: str) -> Any:
    """A package that a backbone comes from.

    Raises:
        Re2TALError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise Re2TALError(
            f"this backbone comes from {package.partition('.')[0]}, which does not load ({error}); install it with pip"
        ) from None


def pieces(clip: Tensor, frames: int, size: list[int]) -> Tensor:
    """A clip (batch, 3, n * frames, height, width) as (batch * n, 3, frames, height, width).

    Raises:
        Re2TALError: it does not divide into such pieces, or the network was made for pictures of another size.
    """
    if clip.shape[2] % frames or list(clip.shape[3:]) != size:
        raise Re2TALError(
            f"this backbone takes {frames} pictures of {size[0]} x {size[1]}, or a multiple of them, not "
            f"{clip.shape[2]} of {clip.shape[3]} x {clip.shape[4]}; change clip.frames and clip.size"
        )
    return clip.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)


def rejoined(features: Tensor, batch: int) -> Tensor:
    """Features (batch * n, channels, steps) of pieces as (batch, channels, n * steps)."""
    return features.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
