"""The head of ActionFormer (Zhang et al., ECCV 2022): a pyramid of transformer blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from examples.re2tal.heads.base import Head
from examples.re2tal.heads.dialect import dialect_of
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
    projection: int = 2,
    kernel: int = 3,
    positions: int | None = None,
    drop_path: float = 0.1,
    scale: float | None = 1e-4,
    dialect: str = "revwire",
    **options: Any,
) -> Head:
    """The head; the defaults are those of its THUMOS-14 configuration. See `TransformerBlock`, `Pyramid` and `Head`.

    Args:
        in_channels: Channels of the features.
        classes: How many there are.
        channels: Of all levels.
        levels: How many the pyramid has.
        stem: Blocks before the finest level.
        heads: Of attention.
        window: How many positions one attends to; None: all.
        projection: Convolutions before the blocks.
        kernel: Their size.
        positions: Length of the table of positions, ActivityNet's configuration has one; None: no table.
        drop_path: Probability to leave a residual branch out.
        scale: What the branches are scaled by at first; None: not at all.
        dialect: Whose head it is: `"revwire"`, `"opentad"` or `"actionformer"`, see `Dialect`.
        options: Of `Head`.

    Raises:
        Re2TALError: there is no such dialect.
    """
    own = dialect_of(dialect)
    block = partial(TransformerBlock, channels, heads, window, drop_path=drop_path, scale=scale)
    pyramid = Pyramid(
        in_channels,
        channels,
        levels,
        stem,
        lambda stride: block(stride=stride),
        projection=projection,
        kernel=kernel,
        positions=positions,
        dialect=own,
    )
    head = Head(pyramid, channels=channels, classes=classes, levels=levels, dialect=own, **options)
    if own.start_at_zero:
        _zero_biases(head)
    return head


def _zero_biases(head: Head) -> None:
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv1d) and module.bias is not None and name != "classify.last.conv":
            nn.init.zeros_(module.bias)
