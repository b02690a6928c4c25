"""Trained heads of OpenTAD and of the ActionFormer release under the names that they have here, and back.

A rule is a pair of names with the same `{}` in both; no tensor is transposed. Three things have other shapes there:
norms and layer scales carry ones for batch and position, the scales of the levels are numbers of their own, and what
the losses are divided by is an integer in OpenTAD and not in the original's files at all.

TriDet (Shi et al., CVPR 2023) packs its files as ActionFormer does, but its blocks and its boundary head have no
counterpart here, and a file of it is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from examples.re2tal.heads.base import Head

LAYOUTS = ("opentad", "actionformer")

_SHOWN = 6
"""How many names an error lists of what is missing, and of what is too much."""


def _blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    """The rules of a transformer block."""
    rules = [(f"{theirs}.ln{i}.{{}}", f"{ours}.norms.{i - 1}.{{}}") for i in (1, 2)]
    for i, name in enumerate(("query", "key", "value")):
        rules += [
            (f"{theirs}.attn.{name}_conv.conv.weight", f"{ours}.attention.before.{i}.conv.weight"),
            (f"{theirs}.attn.{name}_norm.{{}}", f"{ours}.attention.norms.{i}.{{}}"),
            (f"{theirs}.attn.{name}.{{}}", f"{ours}.attention.inward.{i}.{{}}"),
        ]
    return [
        *rules,
        (f"{theirs}.attn.proj.{{}}", f"{ours}.attention.outward.{{}}"),
        (f"{theirs}.mlp.0.{{}}", f"{ours}.mlp.0.{{}}"),
        (f"{theirs}.mlp.3.{{}}", f"{ours}.mlp.2.{{}}"),
        (f"{theirs}.drop_path_attn.scale", f"{ours}.scales.0"),
        (f"{theirs}.drop_path_mlp.scale", f"{ours}.scales.1"),
    ]


def _convolutions(theirs: str, norms: str, ours: str) -> list[tuple[str, str]]:
    """The rules of convolutions, each with a norm."""
    return [
        (f"{theirs}.conv.weight", f"{ours}.convs.{{}}.conv.weight"),
        (f"{norms}.{{}}", f"{ours}.norms.{{}}.{{}}"),
    ]


RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "opentad": (
        *_convolutions("projection.embed.{}", "projection.embed.{}.norm", "pyramid.projection"),
        *_blocks("projection.stem.{}", "pyramid.stem.{}"),
        *_blocks("projection.branch.{}", "pyramid.down.{}"),
        ("neck.fpn_norms.{}.{}", "pyramid.norms.{}.{}"),
        *_convolutions("rpn_head.cls_convs.{}", "rpn_head.cls_convs.{}.norm", "classify.body"),
        *_convolutions("rpn_head.reg_convs.{}", "rpn_head.reg_convs.{}.norm", "regress.body"),
        ("rpn_head.cls_head.{}", "classify.last.conv.{}"),
        ("rpn_head.reg_head.{}", "regress.last.conv.{}"),
        ("rpn_head.scale.{}.scale", "scales.{}"),
        ("rpn_head.loss_normalizer", "normalizer"),
    ),
    "actionformer": (
        *_convolutions("backbone.embd.{}", "backbone.embd_norm.{}", "pyramid.projection"),
        *_blocks("backbone.stem.{}", "pyramid.stem.{}"),
        *_blocks("backbone.branch.{}", "pyramid.down.{}"),
        ("neck.fpn_norms.{}.{}", "pyramid.norms.{}.{}"),
        *_convolutions("cls_head.head.{}", "cls_head.norm.{}", "classify.body"),
        *_convolutions("reg_head.head.{}", "reg_head.norm.{}", "regress.body"),
        ("cls_head.cls_head.conv.{}", "classify.last.conv.{}"),
        ("reg_head.offset_head.conv.{}", "regress.last.conv.{}"),
        ("reg_head.scale.{}.scale", "scales.{}"),
    ),
}
"""Their names and ours, by layout."""

_MARKS = {"opentad": "rpn_head.", "actionformer": "cls_head."}
_IGNORED = {
    "opentad": ("backbone.", "projection.pos_embed"),
    "actionformer": ("point_generator.", "backbone.pos_embd"),
}
"""What a file may hold beside its head: a backbone, tables that are computed."""

_TRIDET = re.compile(r"\.(psi|convw|convkw|global_fc)\.|^start_head\.|^end_head\.")
"""Parts that TriDet's blocks and boundary heads alone have."""

_ROWS = re.compile(r"\.norms\.\d+\.(weight|bias)$")
_SCALES = re.compile(r"\.scales\.[01]$")


def layout_of(names: Iterable[str]) -> str:
    """Which of `LAYOUTS` the names of a head's tensors are.

    Raises:
        Re2TALError: none of them.
    """
    names = [name.removeprefix("module.") for name in names]
    for layout, mark in _MARKS.items():
        if any(name.startswith(mark) for name in names):
            return layout
    some = ", ".join(names[:3]) or "nothing"
    raise Re2TALError(
        f"the file holds {some}, ...: no head of {' or '.join(LAYOUTS)}; give the tensors below state_dict_ema or "
        "state_dict of a trained detector"
    )


def from_layout(
    tensors: Mapping[str, Tensor], layout: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A trained head's tensors under the names of `Head`.

    Args:
        tensors: By their names, with or without `module.` in front, maybe among those of a backbone.
        layout: One of `LAYOUTS`; told by the names if not given.

    Returns:
        The tensors; and the names that no rule knows, neither as the head's nor as something beside it.

    Raises:
        Re2TALError: the names are those of no layout.
    """
    layout = layout or layout_of(tensors)
    rules = [(_pattern(theirs), ours) for theirs, ours in RULES[layout]]
    found: dict[str, Tensor] = {}
    unknown = []
    for full, tensor in tensors.items():
        name = full.removeprefix("module.")
        ours = _renamed(name, rules)
        if ours is not None:
            found[ours] = _to_ours(ours, tensor)
        elif not name.startswith(_IGNORED[layout]):
            unknown.append(full)
    scales = [name for name in found if name.startswith("scales.")]
    if scales:
        parts = [found.pop(f"scales.{i}", None) for i in range(len(scales))]
        found["scales"] = torch.stack([part.reshape(()) for part in parts if part is not None])
    return found, unknown


def to_layout(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors of `Head.state_dict()` under the names and in the shapes of a layout; what it lacks is left out.

    Raises:
        Re2TALError: there is no such layout.
    """
    if layout not in RULES:
        raise Re2TALError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    rules = [(_pattern(ours), theirs) for theirs, ours in RULES[layout]]
    flat = {name: tensor for name, tensor in tensors.items() if name != "scales"}
    if "scales" in tensors:
        flat |= {f"scales.{i}": scale for i, scale in enumerate(tensors["scales"])}
    found = {}
    for name, tensor in flat.items():
        theirs = _renamed(name, rules)
        if theirs is None:
            continue
        ones = _SCALES.search(name) or (layout == "actionformer" and _ROWS.search(name))
        found[theirs] = tensor.reshape(1, -1, 1) if ones else tensor
    return found


def load_head(head: Head, tensors: Mapping[str, Tensor], layout: str | None = None) -> str:
    """Load a trained head, all of it and nothing else.

    The normalizer, which the original does not save, stays as configured; all other tensors have to be there.

    Args:
        head: Changed in place.
        tensors: See `from_layout`.
        layout: One of `LAYOUTS`; told by the names if not given.

    Returns:
        The layout.

    Raises:
        Re2TALError: a tensor is missing, too much or of another shape; the message lists them.
    """
    layout = layout or layout_of(tensors)
    found, unknown = from_layout(tensors, layout)
    if strange := [name for name in unknown if _TRIDET.search(name)]:
        raise Re2TALError(f"the file holds TriDet's head ({_listed(strange)}), which has no counterpart here")
    own = head.state_dict()
    missing = [
        name for name in own if name not in found and not (layout == "actionformer" and name == "normalizer")
    ]
    others = [name for name in found if name not in own]
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}"
        for name in found.keys() & own.keys()
        if found[name].shape != own[name].shape
    ]
    faults = {
        "unknown": unknown,
        "not in this head": others,
        "missing": missing,
        "of another shape": sorted(shapes),
    }
    if told := "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names):
        raise Re2TALError(f"the head of this {layout} file does not fit head.options: {told}")
    head.load_state_dict(found, strict=False)
    return layout


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\w+)"))


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, other in rules:
        if match := pattern.fullmatch(name):
            return other.format(*match.groups())
    return None


def _to_ours(name: str, tensor: Tensor) -> Tensor:
    if name == "normalizer":
        return tensor.float().reshape(())
    if _SCALES.search(name):
        return tensor.reshape(-1, 1)
    return tensor.flatten() if _ROWS.search(name) else tensor


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
