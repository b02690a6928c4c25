"""Clips of annotated videos, decoded as they are asked for.

Which part of a video a clip shows, and how its pictures are changed, depends on (seed, epoch, index) alone: not on the
process that loads it, nor on what was loaded before. So a run that was stopped in the middle of an epoch goes on with
the clips that it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from examples.re2tal.data import sampling
from examples.re2tal.data.augment import Change, middle
from examples.re2tal.data.by_frame import ByFrame
from examples.re2tal.data.sampling import ByTime, TimeGrid, View
from examples.re2tal.data.video import VideoError, open_video, shown_at
from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
    from examples.re2tal.data.augment import Augmentation

Sampling = Literal["resize", "window"]

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
PREFIXES = ("", "v_")


@dataclass
class Clip:
    """A part of a video and what happens in it.

    Attributes:
        video: The video's id.
        frames: (frames, 3, height, width) uint8.
        segments: (actions, 2) Starts and ends, in positions.
        labels: (actions,) Indices of classes.
        mask: (positions,) Which positions lie within the video.
        grid: Where the positions are.
        skipped: What could not be read instead, as (path, reason).
    """

    video: str
    frames: Tensor
    segments: Tensor
    labels: Tensor
    mask: Tensor
    grid: TimeGrid
    skipped: tuple[str, str] | None = None


@dataclass
class Batch:
    """Clips side by side; `frames` is (batch, frames, 3, height, width), `mask` (batch, positions).

    Attributes:
        skipped: The files that could not be read, as (path, reason).
    """

    videos: list[str]
    frames: Tensor
    segments: list[Tensor]
    labels: list[Tensor]
    mask: Tensor
    grids: list[TimeGrid]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        """How many clips there are."""
        return len(self.videos)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return replace(
            self,
            frames=self.frames.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            segments=[segments.to(device, non_blocking=True) for segments in self.segments],
            labels=[labels.to(device, non_blocking=True) for labels in self.labels],
        )

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from without waiting."""
        return replace(self, frames=self.frames.pin_memory(), mask=self.mask.pin_memory())


class Clips(Dataset[Clip]):
    """The clips of one subset.

    In training, item `i` is a random window of video `i`, or all of it in *resize*; else the items are all windows of
    all videos, in order. A file that cannot be read gives the clip of another video in training, and no clip (a clip
    without pictures) else; either way the file and the reason travel with it.

    Args:
        annotations: The data set.
        subset: Which of its subsets.
        folder: Where the video files are: `<id>` or `v_<id>` with a usual suffix.
        sampling: *resize* or *window*, see `examples.re2tal.data.sampling`.
        frames: Pictures in a clip.
        positions: Positions in it, `frames` or a whole part of it.
        size: Height and width of the pictures.
        rate: Pictures a second, in *window*, by *time*.
        overlap: Of evaluation's windows.
        by: *time*, or *frame* as OpenTAD, see `examples.re2tal.data.by_frame`.
        stride: Pictures of the video from one position to the next, in *window*, by *frame*.
        fit: What happens to pictures of another shape than `size`: *squeeze*, or *crop*: the short side is scaled,
            and the middle is shown.
        short_side: What the short side is scaled to before training crops, in *crop*; that of `size` if not given.
        shortest: Actions that last less than this part of their video are not trained on.
        training: Random windows, and videos without actions left out; or all windows.
        seed: Of everything random.
        class_agnostic: All labels are 0, for a head that only tells action from background.
        decoder: See `open_video`.
        augment: Arguments of `Change`, in training.

    Raises:
        Re2TALError: a video's file is missing, and `missing_ok` is not set; the message says which and where it was
            looked for. Or `frames` is no multiple of `positions`, or it is to be sampled by frame and its annotation
            does not tell how many frames there are.
    """

    def __init__(
        self,
        annotations: Annotations,
        subset: str,
        folder: str | Path,
        *,
        frames: int,
        positions: int,
        size: tuple[int, int],
        sampling: Sampling = "window",
        rate: float = 30.0,
        overlap: float = 0.5,
        by: Literal["time", "frame"] = "time",
        stride: int = 4,
        fit: Literal["squeeze", "crop"] = "squeeze",
        short_side: int | None = None,
        shortest: float = 0.0,
        training: bool = False,
        seed: int = 0,
        class_agnostic: bool = False,
        missing_ok: bool = False,
        decoder: str = "pyav",
        augment: Augmentation | None = None,
    ) -> None:
        if frames % positions:
            raise Re2TALError(
                f"{frames} frames do not divide into {positions} positions; give a multiple of them"
            )
        self.index = {name: i for i, name in enumerate(annotations.classes)}
        self.sampling, self.positions, self.size, self.fit = sampling, positions, size, fit
        self.training, self.seed, self.shortest = training, seed, shortest if training else 0.0
        self.sampler = (
            ByFrame(frames, positions, stride, overlap)
            if by == "frame"
            else ByTime(frames, positions, rate, overlap)
        )
        self.short_side = short_side if training and short_side is not None else min(size)
        self.class_agnostic, self.decoder, self.epoch = class_agnostic, decoder, 0
        self.change = Change(size, **(augment or {})) if training else None  # type: ignore[arg-type]
        videos = [v for v in annotations.subset(subset) if self._actions(v) or not training]
        self.paths, self.missing = found_files(videos, Path(folder))
        if self.missing and (not missing_ok or not self.paths):
            some = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            raise Re2TALError(
                f"{len(self.missing)} of {len(videos)} videos of the subset {subset!r} are not in {folder}: {some}; "
                "files are called <id>.mp4 or v_<id>.mp4; set missing_ok to go on without them"
            )
        self.videos = [video for video in videos if video.id in self.paths]
        self._items = [(video, view) for video in self.videos for view in self._views(video)]

    def _actions(self, video: AnnotatedVideo) -> list[Action]:
        least = self.shortest * video.duration
        return [action for action in video.actions if action.end - action.start > least]

    def _views(self, video: AnnotatedVideo) -> Sequence[View | None]:
        """The windows of evaluation; None where chance, or the file, tells what is shown."""
        if self.sampling == "resize" or self.training:
            return [None]
        if isinstance(self.sampler, ByTime):
            return self.sampler.windows(video.duration, 0)
        count = video.frames or round((video.fps or 0.0) * video.duration)
        if not count:
            raise Re2TALError(
                f"the annotation of {video.id} has neither frame nor fps, which clip.by=frame needs to lay windows; "
                "add them, or give clip.by=time"
            )
        return self.sampler.windows(video.duration, count)

    def __len__(self) -> int:
        """How many clips an epoch has."""
        return len(self._items)

    def video_of(self, index: int) -> str:
        """Id of the video that item `index` shows, in evaluation."""
        return self._items[index][0].id

    def set_epoch(self, epoch: int) -> None:
        """Have other random windows; before the workers of the epoch start."""
        self.epoch = epoch

    def __getitem__(self, item: int | tuple[int, int]) -> Clip:
        """Clip `item` of the epoch set, or `(epoch, item)`.

        The second form is for workers that live longer than an epoch, and do not hear of `set_epoch`.
        """
        epoch, index = item if isinstance(item, tuple) else (self.epoch, item)
        video, view = self._items[index]
        random = np.random.default_rng((self.seed, epoch, index))
        try:
            return self._clip(video, view, random)
        except VideoError as error:
            failure = error.path, error.reason
        if self.training:
            # the next video that can be read takes the place, so that every step has the same number of clips
            for other in range(index + 1, index + len(self)):
                video, view = self._items[other % len(self)]
                try:
                    return replace(self._clip(video, view, random), skipped=failure)
                except VideoError:
                    continue
        none = torch.empty((0, 3, *self.size), dtype=torch.uint8)
        empty = torch.empty(0)
        grid = TimeGrid(0.0, 1.0, video.duration)
        return Clip(video.id, none, empty.reshape(0, 2), empty.long(), empty.bool(), grid, failure)

    def _clip(self, video: AnnotatedVideo, view: View | None, random: np.random.Generator) -> Clip:
        actions = self._actions(video)
        seconds = np.array([(a.start, a.end) for a in actions], dtype=np.float64).reshape(-1, 2)
        labels = np.array(
            [0 if self.class_agnostic else self.index[a.label] for a in actions], dtype=np.int64
        )
        with open_video(self.paths[video.id], decoder=self.decoder) as reader:
            if view is None and self.sampling == "window":
                count = video.frames or len(reader)
                view, chosen, segments = self.sampler.part(video.duration, count, seconds, random)
            else:
                view = view or self.sampler.whole(video.duration, len(reader))
                kept = sampling.KEPT if self.training else 0.0
                chosen, segments = sampling.clipped(view.grid.positions(seconds), self.positions, kept)
            indices = shown_at(reader.times, view.times) if view.indices is None else view.indices
            size = self.size if self.fit == "squeeze" else self.short_side
            pictures = reader.read(np.minimum(indices, len(reader) - 1), size)
        frames = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        if self.change is not None:
            frames = self.change(frames, int(random.integers(2**31)))
        return Clip(
            video.id,
            middle(frames, self.size).contiguous(),
            torch.from_numpy(segments.astype(np.float32)),
            torch.from_numpy(labels[chosen]),
            torch.arange(self.positions) < view.valid,
            view.grid,
        )


def collate(clips: Sequence[Clip]) -> Batch:
    """Clips side by side; those without pictures are left out, and listed in `skipped`."""
    there = [clip for clip in clips if len(clip.frames)]
    skipped = [clip.skipped for clip in clips if clip.skipped is not None]
    return Batch(
        [clip.video for clip in there],
        torch.stack([clip.frames for clip in there]) if there else torch.empty(0, dtype=torch.uint8),
        [clip.segments for clip in there],
        [clip.labels for clip in there],
        torch.stack([clip.mask for clip in there]) if there else torch.empty(0, dtype=torch.bool),
        [clip.grid for clip in there],
        skipped,
    )


def found_files(videos: Sequence[AnnotatedVideo], folder: Path) -> tuple[Mapping[str, Path], list[str]]:
    """The file of each video by its id, and the ids of those without one.

    Raises:
        Re2TALError: there is no such folder.
    """
    if not folder.is_dir():
        raise Re2TALError(f"{folder} is no folder of videos; give data.videos=FOLDER")
    there = {path.name: path for path in folder.iterdir()}
    names = (
        (video.id, f"{prefix}{video.id}{suffix}")
        for video in videos
        for prefix in PREFIXES
        for suffix in SUFFIXES
    )
    found: dict[str, Path] = {}
    for key, name in names:
        if name in there:
            found.setdefault(key, there[name])
    return found, [video.id for video in videos if video.id not in found]
