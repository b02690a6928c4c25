"""Video backbones: from a clip to features over time.

Every backbone is an ordinary network from its own source; none knows anything of rewiring. `build_backbone` finds one
by name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
