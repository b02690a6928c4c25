"""Which moments of a video a clip is made of, and how its positions relate to seconds.

A clip has `frames` pictures and `positions` places on the time axis of the detection head, a whole number of pictures
apart. Everything is said in seconds, so videos of any frame rate share one grid; the picture of a moment is the one
that a player would show then. Two ways to sample (Re2TAL, section 4.1; the names are OpenTAD's):

- *resize* (ActivityNet): the whole video, whatever its length, in `frames` moments at the middles of equal parts;
- *window* (THUMOS-14): a fixed `rate` of pictures a second. Training takes one random window of a video
  (`truncated`), evaluation slides over all of it (`sliding`).

`examples.re2tal.data.by_frame` is the other grid, that of OpenTAD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.intp]
    Part = tuple["View", Integers, Floats]

KEPT = 0.75
"""How much of an action must lie in a random window for the action to be one of it (ActionFormer)."""

TRIES = 200
"""How many random windows are drawn at most until one has an action in it."""

_SHORTEST = 0.9
"""The least part of a short video that training shows of it."""

_EPSILON = 1e-9


@dataclass(frozen=True)
class TimeGrid:
    """The moments of a clip's positions: position `p` is at `(origin + p * step) / rate` seconds of its video.

    Attributes:
        origin: Seconds, or number of the frame, of position 0.
        step: Seconds, or frames, from one position to the next.
        duration: The video's length in seconds.
        rate: How many of the units of origin and step are a second.
    """

    origin: float
    step: float
    duration: float
    rate: float = 1.0

    def seconds(self, positions: Floats) -> Floats:
        """Seconds of positions (any shape), within the video."""
        return np.clip(self.moments(np.asarray(positions, dtype=np.float64)), 0.0, self.duration)

    def moments(self, positions: NDArray[Any]) -> NDArray[Any]:
        """Seconds of positions (any shape), also before and after the video, as precise as they are."""
        found: NDArray[Any] = (np.asarray(positions) * self.step + self.origin) / self.rate
        return found

    def positions(self, seconds: Floats) -> Floats:
        """Positions of moments (any shape); those outside of the clip lie outside of its positions."""
        return (np.asarray(seconds, dtype=np.float64) * self.rate - self.origin) / self.step


@dataclass(frozen=True)
class View:
    """What a clip shows of its video.

    Attributes:
        times: (frames,) The moment of each picture in seconds; the last picture stays beyond the video's end.
        valid: How many positions lie within the video.
        grid: Where its positions are.
        indices: (frames,) Which pictures of the file, where they are chosen by number and not by time.
    """

    times: Floats
    valid: int
    grid: TimeGrid
    indices: Integers | None = None


@dataclass(frozen=True)
class ByTime:
    """Clips at moments, see the functions below; numbers of pictures do not matter.

    Attributes:
        frames: Pictures in a clip.
        positions: Positions in it.
        rate: Pictures a second, in windows.
        overlap: Part of a window that the next one shows again.
    """

    frames: int
    positions: int
    rate: float = 30.0
    overlap: float = 0.5

    def whole(self, duration: float, count: int) -> View:  # noqa: ARG002  # as ByFrame is called
        """All of a video."""
        return resized(duration, self.frames, self.positions)

    def windows(self, duration: float, count: int) -> list[View]:  # noqa: ARG002
        """The windows of evaluation."""
        return sliding(duration, self.rate, self.frames, self.positions, self.overlap)

    def part(self, duration: float, count: int, segments: Floats, random: np.random.Generator) -> Part:  # noqa: ARG002
        """One random window for training; arguments and result are those of `truncated`."""
        return truncated(duration, self.rate, self.frames, self.positions, segments, random)


def resized(duration: float, frames: int, positions: int) -> View:
    """The whole video in `frames` pictures."""
    times = (np.arange(frames) + 0.5) * (duration / frames)
    return View(times, positions, TimeGrid(0.0, duration / positions, duration))


def sliding(duration: float, rate: float, frames: int, positions: int, overlap: float) -> list[View]:
    """Windows that together cover every position of a video.

    Args:
        duration: Its length in seconds.
        rate: Pictures a second.
        frames: Pictures in a window.
        positions: Positions in a window.
        overlap: Part of a window that the next one shows again, from 0 to less than 1. The last window ends with the
            video and may overlap more.

    Raises:
        Re2TALError: the overlap is not in that range.
    """
    if not 0 <= overlap < 1:
        raise Re2TALError(f"windows can overlap by 0 up to less than 1 of their length, not by {overlap}")
    length = _length(duration, rate, frames, positions)
    last = max(0, length - positions)
    starts = [*range(0, last, max(1, round(positions * (1 - overlap)))), last]
    return [_window(start, length - start, duration, rate, frames, positions) for start in starts]


def truncated(
    duration: float,
    rate: float,
    frames: int,
    positions: int,
    segments: Floats,
    random: np.random.Generator,
) -> Part:
    """One random window for training, with an action in it where chance finds one.

    A video no longer than a window is cut to 90 to 100 % of its length.

    Args:
        duration: The video's length in seconds.
        rate: Pictures a second.
        frames: Pictures in the window.
        positions: Positions in it.
        segments: (actions, 2) Starts and ends in seconds.
        random: Where chance comes from.

    Returns:
        The window; the indices of the actions of which at least `KEPT` lies in it; their segments in its positions,
        cut to it. If 200 windows hold none, the last of them, with no actions.
    """
    length = _length(duration, rate, frames, positions)
    shown = min(positions, length)
    if length <= positions:
        shown = max(1, int(length * random.uniform(_SHORTEST, 1.0)))
    for _ in range(TRIES):
        start = int(random.integers(0, length - shown + 1))
        view = _window(start, shown, duration, rate, frames, positions)
        kept, inside = clipped(view.grid.positions(segments), shown)
        if len(kept) or not len(segments):
            break
    return view, kept, inside


def clipped(segments: Floats, positions: int, kept: float = KEPT) -> tuple[NDArray[np.intp], Floats]:
    """Segments (actions, 2) of which the part `kept` lies in `[0, positions]`: their indices, and they cut to it."""
    inside = np.clip(segments, 0.0, positions)
    part = (inside[:, 1] - inside[:, 0]) / np.maximum(segments[:, 1] - segments[:, 0], _EPSILON)
    chosen = np.flatnonzero((part >= kept) & (part > 0))
    return chosen, inside[chosen]


def _length(duration: float, rate: float, frames: int, positions: int) -> int:
    """How many positions a video has."""
    # 10 s at 5 positions a second are 50 of them, also where rounding has left 50.000000001
    return max(1, int(np.ceil(duration * rate * positions / frames - _EPSILON)))


def _window(start: int, left: int, duration: float, rate: float, frames: int, positions: int) -> View:
    step = frames / positions / rate
    grid = TimeGrid(start * step, step, duration)
    valid = min(positions, left)
    times = grid.origin + np.minimum(np.arange(frames), np.ceil(valid * frames / positions) - 1) / rate
    return View(times, valid, grid)
