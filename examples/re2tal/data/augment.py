"""What training changes about a clip's pictures: the same for all of them, so that motion stays motion."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

Augmentation = dict[str, float | bool]
"""Names and strengths; see `Change`."""


class Change:
    """A random change of clips (frames, 3, height, width), uint8, the same for all their pictures.

    Args:
        size: Height and width of what comes out.
        crop: The least part of the picture's area that is shown, scaled up to `size`; 1: all of it.
        flip: Mirror half of the clips. Leave it out where left and right tell classes apart.
        jitter: By which part brightness, contrast and saturation change at most.
        hue: By which part of the colour wheel the hue changes at most, to 0.5.
        rand_augment: How many operations of RandAugment (Cubuk et al., 2020) each clip goes through.
        magnitude: How strong those are, to 30.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        crop: float = 1.0,
        flip: bool = False,
        jitter: float = 0.0,
        hue: float = 0.0,
        rand_augment: int = 0,
        magnitude: int = 27,
    ) -> None:
        steps: list[v2.Transform] = []
        if crop < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(crop, 1.0), antialias=True))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if rand_augment:
            steps.append(v2.RandAugment(rand_augment, magnitude))
        if jitter or hue:
            steps.append(v2.ColorJitter(jitter, jitter, jitter, hue))
        self._together = v2.Compose(steps) if steps else v2.Identity()

    def __call__(self, frames: Tensor, seed: int) -> Tensor:
        """The changed clip; torch's generator goes on as if nothing was drawn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # as a Video, so that one random draw holds for all pictures
            changed: Tensor = self._together(tv_tensors.Video(frames))
            return changed.as_subclass(Tensor)


def middle(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (..., height, width) of pictures that are at least as large."""
    top, left = ((a - b) // 2 for a, b in zip(frames.shape[-2:], size, strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]
