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
    """

    def __init__(
        self, size: tuple[int, int], *, crop: float = 1.0, flip: bool = False, jitter: float = 0.0
    ) -> None:
        steps: list[v2.Transform] = []
        if crop < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(crop, 1.0), antialias=True))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        self._together = v2.Compose(steps) if steps else v2.Identity()

    def __call__(self, frames: Tensor, seed: int) -> Tensor:
        """The changed clip; torch's generator goes on as if nothing was drawn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # as a Video, so that one random draw holds for all pictures
            changed: Tensor = self._together(tv_tensors.Video(frames))
            return changed.as_subclass(Tensor)
