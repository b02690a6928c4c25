"""The head of ActionFormer (Zhang et al., ECCV 2022): a pyramid of transformer blocks with local attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from examples.re2tal.heads.base import Head
from examples.re2tal.heads.layers import TransformerBlock
from examples.re2tal.heads.pyramid import Pyramid


def build(
    in_channels: int,
    classes: int,
    *,
    channels: int = 512,
    levels: int = 6,
    stem: int = 2,
    heads: int = 4,
    window: int | None = 19,
    drop_path: float = 0.1,
    scale: float | None = 1e-4,
    **options: Any,
) -> Head:
    """The head; the defaults are those of its THUMOS-14 configuration. See `TransformerBlock`, `Pyramid` and `Head`."""
    block = partial(TransformerBlock, channels, heads, window, drop_path=drop_path, scale=scale)
    pyramid = Pyramid(in_channels, channels, levels, stem, lambda stride: block(stride=stride))
    return Head(pyramid, channels=channels, classes=classes, levels=levels, **options)
