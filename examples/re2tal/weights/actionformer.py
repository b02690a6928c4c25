"""Layouts of the head of ActionFormer: that of detectors of OpenTAD, and that of ActionFormer's own repository."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from examples.re2tal.weights.layouts import Layout, Origin

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class _Names:
    """What differs between the two.

    Attributes:
        blocks: Before the names of the blocks.
        projections, norms: Of the convolutions before the blocks, and of their norms.
        towers: By ours: the convolutions of a tower, their norms, and the last one.
        scale: The factors of the levels.
        channels: The shape of what norms have for each channel.
    """

    blocks: str
    projections: str
    norms: str
    towers: dict[str, tuple[str, str, str]]
    scale: str
    channels: tuple[int, ...] | None


_OPENTAD = _Names(
    blocks="projection",
    projections="projection.embed.{}.conv",
    norms="projection.embed.{}.norm",
    towers={
        "classify": ("rpn_head.cls_convs.{}.conv", "rpn_head.cls_convs.{}.norm", "rpn_head.cls_head"),
        "regress": ("rpn_head.reg_convs.{}.conv", "rpn_head.reg_convs.{}.norm", "rpn_head.reg_head"),
    },
    scale="rpn_head.scale.{}.scale",
    channels=None,
)
_ORIGINAL = _Names(
    blocks="backbone",
    projections="backbone.embd.{}.conv",
    norms="backbone.embd_norm.{}",
    towers={
        "classify": ("cls_head.head.{}.conv", "cls_head.norm.{}", "cls_head.cls_head.conv"),
        "regress": ("reg_head.head.{}.conv", "reg_head.norm.{}", "reg_head.offset_head.conv"),
    },
    scale="reg_head.scale.{}.scale",
    channels=(1, -1, 1),
)


def _origin(name: str, *, names: _Names) -> Origin:
    """From our head's name, as `pyramid.stem.0.norms.1.weight` or `classify.last.conv.bias`."""
    if name == "scales":
        return Origin(names.scale)
    if name == "normalizer":  # a plain number in ActionFormer's own code, which its files do not hold
        return Origin("rpn_head.loss_normalizer", optional=names is _ORIGINAL)
    room, _, rest = name.partition(".")
    if room in names.towers:
        convs, norms, last = names.towers[room]
        if rest.startswith("last."):
            return Origin(f"{last}.{rest.removeprefix('last.conv.')}")
        _, kind, index, *_, tensor = rest.split(".")
        return _conv_or_norm(kind, convs.format(index), norms.format(index), tensor, names)
    part, index, *inner, tensor = rest.split(".")
    if part == "norms":
        return Origin(f"neck.fpn_norms.{index}.{tensor}", shape=names.channels)
    if part == "projection":
        kind, index = index, inner[0]
        return _conv_or_norm(kind, names.projections.format(index), names.norms.format(index), tensor, names)
    return _in_block(f"{names.blocks}.{'stem' if part == 'stem' else 'branch'}.{index}", inner, tensor, names)


def _conv_or_norm(kind: str, conv: str, norm: str, tensor: str, names: _Names) -> Origin:
    return Origin(f"{conv}.{tensor}") if kind == "convs" else Origin(f"{norm}.{tensor}", shape=names.channels)


def _in_block(block: str, inner: list[str], tensor: str, names: _Names) -> Origin:
    """A tensor of a transformer block; `inner` is our name of its layer, taken apart at the dots."""
    if inner[0] == "scales":
        return Origin(f"{block}.drop_path_{('attn', 'mlp')[int(tensor)]}.scale", shape=(1, -1, 1))
    if inner[0] == "norms":
        return Origin(f"{block}.ln{int(inner[1]) + 1}.{tensor}", shape=names.channels)
    if inner[0] == "mlp":
        return Origin(f"{block}.mlp.{ {'0': '0', '2': '3'}[inner[1]] }.{tensor}")
    _, kind, *which = inner
    if kind == "outward":
        return Origin(f"{block}.attn.proj.{tensor}")
    of = f"{block}.attn.{_PARTS[int(which[0])]}"
    if kind == "norms":
        return Origin(f"{of}_norm.{tensor}", shape=names.channels)
    return Origin(f"{of}_conv.conv.{tensor}" if kind == "before" else f"{of}.{tensor}")


_MARKS = (
    "pyramid.projection.convs.0.conv.weight",
    "pyramid.stem.0.attention.outward.weight",
    "classify.last.conv.weight",
)


def _layout(name: str, names: _Names, others: tuple[str, ...], dialect: str) -> Layout:
    origin, marks = partial(_origin, names=names), [_origin(mark, names=names).name for mark in _MARKS]
    # trained weights give the logits that they were trained for in their own dialect alone
    return Layout(name, tuple(marks), origin, others=others, options=lambda _: {"dialect": dialect})


LAYOUTS = (
    _layout("ActionFormer of OpenTAD", _OPENTAD, ("backbone.", "projection.pos_embed"), "opentad"),
    _layout(
        "ActionFormer of its own repository",
        _ORIGINAL,
        ("point_generator.", "backbone.pos_embd"),
        "actionformer",
    ),
    Layout(
        "a head of this example",
        ("scales", "classify.last.conv.weight"),
        Origin,
        ("head.", ""),
        ("backbone.",),
    ),
)


def sizes(get: Callable[[str], Tensor | None]) -> dict[str, int]:
    """Arguments of the head that a file is of, `in_channels` and `classes` among them.

    Args:
        get: The file's tensors by the names that they have in our head.
    """

    def number(name: str) -> int:
        return next(n for n in count() if get(name.format(n)) is None)

    first, last = get("pyramid.projection.convs.0.conv.weight"), get("classify.last.conv.weight")
    assert first is not None
    assert last is not None
    return {
        "in_channels": first.shape[1],
        "classes": last.shape[0],
        "channels": first.shape[0],
        "levels": number("pyramid.norms.{}.weight"),
        "stem": number("pyramid.stem.{}.norms.0.weight"),
        "depth": number("classify.body.convs.{}.conv.weight"),
    }
