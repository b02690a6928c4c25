"""Sampling by the numbers of pictures instead of by seconds, as OpenTAD does it.

The same clips as those of `examples.re2tal.data.sampling` in another grid: positions are a whole number of pictures
apart, whatever a video's frame rate is, and an index means that picture of the file. Kept as it is there:

- the last window is listed twice where a video's positions are a whole number of hops, and windows that overlap by
  less than half may miss its end;
- pictures that do not fill a position at the end are no position, though they are shown;
- in training, actions begin and end at whole pictures, and windows begin at any picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.re2tal.data.sampling import TRIES, TimeGrid, View, clipped
from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from examples.re2tal.data.sampling import Floats, Integers, Part

_SHORTEST = 0.9
"""The least part of a short video that training shows of it."""


@dataclass(frozen=True)
class ByFrame:
    """Clips of whole pictures.

    Attributes:
        frames: Pictures in a clip.
        positions: Positions in it.
        stride: Pictures of the video from one position to the next, in windows; a multiple of `frames / positions`.
        overlap: Part of a window that the next one shows again, from 0 to less than 1.
    """

    frames: int
    positions: int
    stride: int = 4
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.stride % self._each:
            raise Re2TALError(
                f"clip.stride ({self.stride}) is no multiple of the {self._each} pictures of a position; change "
                "clip.stride or clip.frames"
            )
        if not 0 <= self.overlap < 1:
            raise Re2TALError(
                f"windows can overlap by 0 up to less than 1 of their length, not by {self.overlap}"
            )

    @property
    def _each(self) -> int:
        """Pictures of a position."""
        return self.frames // self.positions

    def whole(self, duration: float, count: int) -> View:
        """All of a video of `count` pictures: those nearest to the middles of `frames` equal parts."""
        step = count / self.frames
        middles = np.arange(step / 2 - 0.5, count + step / 2 - 0.5, step)[: self.frames]
        indices = np.clip(middles, 0, count - 1).round().astype(np.intp)
        return View(
            indices * (duration / count),
            self.positions,
            TimeGrid(0.0, duration / self.positions, duration),
            indices,
        )

    def windows(self, duration: float, count: int) -> list[View]:
        """The windows of evaluation."""
        length, hop = -(-count // self.stride), max(1, int(self.positions * (1 - self.overlap)))
        views = []
        for start in range(0, max(1, length // hop) * hop, hop):
            is_last = start + self.positions > length
            first = max(0, length - self.positions) if is_last else start
            views.append(
                self._view(self._pictures(count)[first * self._each :][: self.frames], duration, count)
            )
            if is_last:
                break
        return views

    def part(self, duration: float, count: int, segments: Floats, random: np.random.Generator) -> Part:
        """One random window for training, with an action in it where chance finds one.

        Args:
            duration: The video's length in seconds.
            count: Its pictures.
            segments: (actions, 2) Starts and ends in seconds.
            random: Where chance comes from.

        Returns:
            As `examples.re2tal.data.sampling.ByTime.part`.
        """
        every = self._pictures(count)
        # in pictures of the clip
        own = np.trunc(segments / duration * count) * (self._each / self.stride)
        shown = self.frames
        if len(every) <= self.frames:
            shown = int(random.integers(max(1, round(_SHORTEST * len(every))), len(every) + 1))
        if shown == len(every):
            return self._view(every, duration, count), np.arange(len(own)), own / self._each
        for _ in range(TRIES):
            start = int(random.integers(0, len(every) - shown + 1))
            kept, inside = clipped(own - start, shown)
            if len(kept) or not len(own):
                break
        return self._view(every[start : start + shown], duration, count), kept, inside / self._each

    def _pictures(self, count: int) -> Integers:
        return np.arange(0, count, self.stride // self._each)

    def _view(self, chosen: Integers, duration: float, count: int) -> View:
        """The view of some pictures, the last repeated as often as needed."""
        indices = np.pad(chosen, (0, self.frames - len(chosen)), mode="edge")
        grid = TimeGrid(float(chosen[0]), float(self.stride), duration, rate=count / duration)
        return View(indices * (duration / count), len(chosen) // self._each, grid, indices)
