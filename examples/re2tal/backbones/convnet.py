"""A small residual network of separable 3D convolutions, which two CPU cores train on the synthetic set in minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from examples.re2tal.backbones.base import Backbone

if TYPE_CHECKING:
    from torch import Tensor


class Block(nn.Module):
    """A pre-activation residual block (He et al., 2016): a convolution in space, then one in time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm3d(channels),
            nn.ReLU(),
            nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(channels),
            nn.ReLU(),
            nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time, height, width) to the same."""
        return x + self.branch(x)


class ConvNet(Backbone):
    """Stem, three stages, mean over space; half as many steps as pictures.

    Args:
        width: Channels of the first stage; each later one has twice as many.
        depths: Blocks in each stage.
        center: Take each point's mean over the clip away from it first: what does not move disappears.
    """

    def __init__(self, width: int = 32, depths: tuple[int, ...] = (1, 2, 2), *, center: bool = False) -> None:
        super().__init__()
        self.center = center
        self.stem = nn.Conv3d(3, width, 5, stride=(2, 4, 4), padding=2, bias=False)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            channels = width * 2**i
            if i:
                stages.append(
                    nn.Sequential(
                        nn.BatchNorm3d(channels // 2),
                        nn.ReLU(),
                        nn.Conv3d(channels // 2, channels, (1, 2, 2), stride=(1, 2, 2), bias=False),
                    )
                )
            stages.append(nn.Sequential(*(Block(channels) for _ in range(depth))))
        self.stages = nn.Sequential(*stages)
        self.channels = width * 2 ** (len(depths) - 1)
        self.norm = nn.Sequential(nn.BatchNorm3d(self.channels), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clip: Tensor) -> Tensor:
        """Features over time, pooled over space."""
        if self.center:
            clip = clip - clip.mean(dim=2, keepdim=True)
        x = self.norm(self.stages(self.stem(clip)))
        return torch.mean(x, dim=(3, 4))


def build(_: str, *, weights: str | None, **options: object) -> ConvNet:
    """The network; it has no weights of its own to download."""
    if weights is not None:
        raise TypeError(f"there are no pretrained weights {weights!r} of the small network; give a file")
    return ConvNet(**options)  # type: ignore[arg-type]
