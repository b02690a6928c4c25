"""SlowFast (Feichtenhofer et al., ICCV 2019), with the names that pytorchvideo gives its tensors.

Two pathways: one sees every fourth picture, the other all of them with an eighth of the channels, and is joined to the
first between the stages by lateral convolutions. Rewired, each pathway's blocks of a stage are one chain but for the
first, which changes the shape; laterals and stage ends see the merged tensor, as in Re2TAL.

There are three networks of that name, of which each has weights of its own (`WIRINGS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from examples.re2tal.backbones.base import IMAGENET, Backbone
from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SPEED = 4  # pictures of the fast pathway for one of the slow
_FUSED = 2  # channels that a lateral makes of each of the fast pathway's
SIZES: dict[str, dict[str, Any]] = {
    "slowfast_r50": {"depths": (3, 4, 6, 3), "base": 64, "fast": 8},
    "slowfast_r101": {"depths": (3, 4, 23, 3), "base": 64, "fast": 8},
}
"""By name: the options that say how large it is."""

# how many pictures the first convolution of a block sees, by stage: the slow pathway looks at time only late
_SLOW_TIMES, _FAST_TIMES = (1, 1, 3, 3), (3, 3, 3, 3)


@dataclass(frozen=True)
class Wiring:
    """Where the SlowFast networks that there are weights of differ.

    Attributes:
        norm_laterals: A lateral convolution is followed by BatchNorm and ReLU.
        relu_before_sum: The first block of a stage is relu(branch) + skip, not relu(branch + skip).
        mean: Of the pixels of each colour, from 0 to 1, in the data it was trained on.
        std: Their standard deviation.
    """

    norm_laterals: bool
    relu_before_sum: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


WIRINGS = {
    "pytorchvideo": Wiring(True, False, (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
    "mmaction2": Wiring(False, False, *IMAGENET),
    "re2tal": Wiring(False, True, *IMAGENET),
}
"""By name: pytorchvideo's network; mmaction2's `ResNet3dSlowFast`; OpenTAD's `ResNet3dSlowFast_inv`, to be rewired."""


class _Stem(nn.Module):
    """(batch, 3, time, height, width) to a quarter of height and width."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, channels, (times, 7, 7), (1, 2, 2), (times // 2, 3, 3), bias=False)
        self.norm = nn.BatchNorm3d(channels)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x))))  # type: ignore[no-any-return]


class _Branch(nn.Module):
    """A bottleneck: 1x1 over `times` pictures, 3x3 with the stride, 1x1; no ReLU at its end."""

    def __init__(self, channels: int, inner: int, out: int, times: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(channels, inner, (times, 1, 1), padding=(times // 2, 0, 0), bias=False)
        self.norm_a = nn.BatchNorm3d(inner)
        self.conv_b = nn.Conv3d(inner, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm_b = nn.BatchNorm3d(inner)
        self.conv_c = nn.Conv3d(inner, out, 1, bias=False)
        self.norm_c = nn.BatchNorm3d(out)
        nn.init.zeros_(self.norm_c.weight)  # a block begins as its skip connection

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.conv_a(x)))
        x = torch.relu(self.norm_b(self.conv_b(x)))
        return self.norm_c(self.conv_c(x))  # type: ignore[no-any-return]


class _First(nn.Module):
    """The first block of a stage, whose skip connection is a convolution."""

    def __init__(
        self, channels: int, inner: int, out: int, times: int, stride: int, *, relu_before_sum: bool
    ) -> None:
        super().__init__()
        self.branch1_conv = nn.Conv3d(channels, out, 1, (1, stride, stride), bias=False)
        self.branch1_norm = nn.BatchNorm3d(out)
        self.branch2 = _Branch(channels, inner, out, times, stride)
        self.relu_before_sum = relu_before_sum

    def forward(self, x: Tensor) -> Tensor:
        skip, branch = self.branch1_norm(self.branch1_conv(x)), self.branch2(x)
        return skip + torch.relu(branch) if self.relu_before_sum else torch.relu(skip + branch)


class _Block(nn.Module):
    """Any other block."""

    def __init__(self, channels: int, inner: int, times: int) -> None:
        super().__init__()
        self.branch2 = _Branch(channels, inner, channels, times, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch2(x))


class _Stage(nn.Module):
    """The blocks of one pathway."""

    def __init__(self, first: _First, blocks: Sequence[_Block]) -> None:
        super().__init__()
        self.res_blocks = nn.Sequential(first, *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_blocks(x)  # type: ignore[no-any-return]


class _Lateral(nn.Module):
    """What the fast pathway sees, as further channels of the slow one."""

    def __init__(self, channels: int, *, norm: bool) -> None:
        super().__init__()
        out = channels * _FUSED
        self.conv_fast_to_slow = nn.Conv3d(channels, out, (7, 1, 1), (_SPEED, 1, 1), (3, 0, 0), bias=False)
        self.norm = nn.BatchNorm3d(out) if norm else None

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        seen = self.conv_fast_to_slow(fast)
        if self.norm is not None:
            seen = torch.relu(self.norm(seen))
        return torch.cat([slow, seen], dim=1)


class _Level(nn.Module):
    """Both stems, or both pathways of a stage, and the lateral after them, if there is one."""

    def __init__(self, slow: nn.Module, fast: nn.Module, lateral: _Lateral | None) -> None:
        super().__init__()
        self.multipathway_blocks = nn.ModuleList([slow, fast])
        self.multipathway_fusion = lateral

    def forward(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow, fast = self.multipathway_blocks[0](slow), self.multipathway_blocks[1](fast)
        return slow if self.multipathway_fusion is None else self.multipathway_fusion(slow, fast), fast


class SlowFast(Backbone):
    """Stem and four stages of each pathway; features of the slow one, and four times as many steps of the fast one.

    Args:
        depths: Blocks of each stage.
        base: Channels of the slow pathway's stem.
        fast: Channels of the fast pathway's.
        wiring: One of `WIRINGS`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        base: int,
        fast: int,
        wiring: str = "pytorchvideo",
    ) -> None:
        super().__init__()
        if wiring not in WIRINGS:
            raise Re2TALError(f"there is no SlowFast wiring {wiring!r}; choose one of {', '.join(WIRINGS)}")
        wired = WIRINGS[wiring]
        self.mean, self.std = wired.mean, wired.std

        def stage(index: int, channels: int, width: int, times: int) -> _Stage:
            inner, stride = width * 2**index, 1 if index == 0 else 2
            out = 4 * inner
            first = _First(channels, inner, out, times, stride, relu_before_sum=wired.relu_before_sum)
            return _Stage(first, [_Block(out, inner, times) for _ in range(depths[index] - 1)])

        levels = [_Level(_Stem(base, 1), _Stem(fast, 5), _Lateral(fast, norm=wired.norm_laterals))]
        slow_in, fast_in = base + _FUSED * fast, fast
        for i, (slow_times, fast_times) in enumerate(zip(_SLOW_TIMES, _FAST_TIMES, strict=True)):
            slow_stage, fast_stage = stage(i, slow_in, base, slow_times), stage(i, fast_in, fast, fast_times)
            fast_in = 4 * fast * 2**i
            slow_in = 4 * base * 2**i + _FUSED * fast_in
            lateral = _Lateral(fast_in, norm=wired.norm_laterals) if i < len(_SLOW_TIMES) - 1 else None
            levels.append(_Level(slow_stage, fast_stage, lateral))
        self.blocks = nn.ModuleList(levels)
        self.channels = 32 * (base + fast)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the slow pathway (batch, 32 base, frames / 4) and of the fast one (batch, 32 fast, frames)."""
        slow, fast = self.maps(clip)
        return torch.mean(slow, dim=(3, 4)), torch.mean(fast, dim=(3, 4))

    def maps(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """The last maps of both pathways, (batch, channels, steps, height / 32, width / 32)."""
        slow, fast = clip[:, :, ::_SPEED], clip
        for level in self.blocks:
            slow, fast = level(slow, fast)
        return slow, fast


def build(name: str, *, weights: str | None, **options: Any) -> SlowFast:
    """`slowfast_r50` or `slowfast_r101`, of 8x8 pictures; weights from a file, `options` of `SlowFast`.

    Raises:
        Re2TALError: weights are asked for by a name, or there is no such wiring.
    """
    if weights is not None:
        raise Re2TALError(
            f"{name} takes its weights from a file (.pyth, .pth or .safetensors), not {weights!r}"
        )
    return SlowFast(**{**SIZES[name], **options})
