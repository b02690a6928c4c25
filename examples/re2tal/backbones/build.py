"""A backbone by its name, with its pretrained weights.

A module of a backbone is imported when it is asked for: each brings a library of its own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Callable

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
        weights: What its source calls the pretrained weights, to be downloaded; or a file, such as `pretrain` writes;
            None: random weights.
        options: Of that backbone.

    Raises:
        Re2TALError: there is none of that name, its package is not installed, or the weights do not fit.
    """
    if name not in _WHERE:
        raise Re2TALError(f"there is no backbone {name!r}; choose one of {', '.join(NAMES)}")
    build: Callable[..., Backbone] = import_module(f"examples.re2tal.backbones.{_WHERE[name]}").build
    is_file = weights is not None and Path(weights).suffix in {".safetensors", ".pth", ".pt"}
    try:
        backbone = build(name, weights=None if is_file else weights, **options)
    except TypeError as error:
        raise Re2TALError(f"backbone {name}: {error}") from None
    if is_file:
        _load(backbone, Path(str(weights)))
    return backbone


def _load(backbone: Backbone, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        backbone.load_state_dict(tensors)
    except OSError as error:
        raise Re2TALError(f"{path}: {error.strerror or error}") from None
    except RuntimeError as error:
        raise Re2TALError(f"{path} does not fit the backbone: {error}") from None
