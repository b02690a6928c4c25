"""What all backbones are, and what several of them use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels of each colour."""


class Backbone(nn.Module):
    """From clips (batch, 3, frames, height, width), normalised, to features (batch, channels, steps).

    A network of several pathways gives the features of each, (batch, channels of it, steps of it).

    Attributes:
        channels: How many features a step has, of all pathways together.
        mean: Of the pixels of each colour, from 0 to 1, in the data it was trained on.
        std: Their standard deviation.
    """

    channels: int
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, ...]:
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


def at_positions(features: Tensor | Sequence[Tensor], positions: int) -> Tensor:
    """What a backbone gave as (batch, channels, positions): each pathway is interpolated, then they are joined.

    Interpolation is linear, between the middles of steps, in float32 or what is more precise.
    """
    pathways = [features] if isinstance(features, torch.Tensor) else features
    return torch.cat([_interpolated(pathway, positions) for pathway in pathways], dim=1)


def _interpolated(features: Tensor, positions: int) -> Tensor:
    if features.shape[2] == positions:
        return features
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return functional.interpolate(precise, positions, mode="linear", align_corners=False)


def pieces(clip: Tensor, frames: int, size: Sequence[int] | None = None) -> Tensor:
    """A clip (batch, 3, n * frames, height, width) as (batch * n, 3, frames, height, width).

    Raises:
        Re2TALError: it does not divide into such pieces, or the network was made for pictures of another size.
    """
    height, width = clip.shape[3:]
    if size is not None and [height, width] != list(size):
        raise Re2TALError(
            f"this backbone takes pictures of {size[0]} x {size[1]}, not {height} x {width}; change clip.size"
        )
    if clip.shape[2] % frames:
        raise Re2TALError(
            f"this backbone takes {frames} pictures, or a multiple of them, not {clip.shape[2]}; change clip.frames"
        )
    return clip.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)


def rejoined(features: Tensor, batch: int) -> Tensor:
    """Features (batch * n, channels, steps, ...) of pieces as (batch, channels, n * steps, ...)."""
    return features.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
