"""A backbone by its name, with its pretrained weights.

A module of a backbone is imported when it is asked for: each brings a library of its own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.re2tal.errors import Re2TALError
from examples.re2tal.weights.families import found_in
from examples.re2tal.weights.layouts import load
from examples.re2tal.weights.reading import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from examples.re2tal.backbones.base import Backbone

_WHERE = {
    "convnet": "convnet",
    "swin3d_t": "video_swin",
    "swin3d_s": "video_swin",
    "swin3d_b": "video_swin",
    "mvit_v2_s": "mvit",
    "videomae_s": "videomae",
    "videomae_b": "videomae",
    "videomae_l": "videomae",
    "vjepa2_l": "vjepa2",
    "slowfast_r50": "slowfast",
    "slowfast_r101": "slowfast",
}
"""Names of backbones, and of the modules here that build them."""

NAMES = tuple(_WHERE)


def build_backbone(name: str, *, weights: str | Path | None = None, **options: Any) -> Backbone:
    """Build a backbone.

    Args:
        name: One of `NAMES`.
        weights: What its source calls the pretrained weights, to be downloaded; None: random weights; or a file: one
            that `pretrain` wrote, or of one of the layouts of `examples.re2tal.weights`. What such a file decides about
            the network, as how a SlowFast is wired, is taken from it, where `options` say nothing else.
        options: Of that backbone.

    Raises:
        Re2TALError: there is none of that name, its package is not installed, or the weights do not fit.
    """
    if name not in _WHERE:
        raise Re2TALError(f"there is no backbone {name!r}; choose one of {', '.join(NAMES)}")
    family = family_of(name)
    build: Callable[..., Backbone] = import_module(f"examples.re2tal.backbones.{family}").build
    found = found_in(Path(str(weights)), family)[1] if is_file(weights) else None
    if found is not None:
        weights, options = None, {**found.options, **options}
    try:
        backbone = build(name, weights=weights, **options)
    except TypeError as error:
        raise Re2TALError(f"backbone {name}: {error}") from None
    if found is not None:
        load(backbone, found, "the backbone")
    return backbone


def family_of(name: str) -> str:
    """The module of a backbone, which is also the name of its family of layouts of weights."""
    return _WHERE[name]


def named(family: str, sizes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the backbone of these sizes, and the options that its name does not imply.

    Args:
        family: As `family_of` says.
        sizes: Options that say how large it is, as `examples.re2tal.weights` reads them from a file.
    """
    known: Mapping[str, Mapping[str, Any]] = import_module(f"examples.re2tal.backbones.{family}").SIZES
    left = {
        name: {key: value for key, value in sizes.items() if value != _plain(of[key])}
        for name, of in known.items()
    }
    name = min(left, key=lambda one: len(left[one]))
    return name, left[name]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_file(weights: str | Path | None) -> bool:
    """Whether weights are a file, and no name that the backbone's source knows."""
    return weights is not None and str(weights).endswith(SUFFIXES)
