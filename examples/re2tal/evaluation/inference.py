"""A model's detections: of the videos of a subset, or of one file."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from examples.re2tal.data.annotations import AnnotatedVideo, Annotations
from examples.re2tal.data.dataset import Clips, collate
from examples.re2tal.data.video import open_video
from examples.re2tal.detector import AMP, candidates
from examples.re2tal.distributed.parallel import gathered_weights
from examples.re2tal.errors import Re2TALError
from examples.re2tal.evaluation.postprocess import (
    Detections,
    joined,
    read_video_classes,
    soft_nms,
    vote,
    with_video_classes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from examples.re2tal.config import Config
    from examples.re2tal.data.sampling import TimeGrid
    from examples.re2tal.detector import Candidates
    from examples.re2tal.distributed.world import World
    from examples.re2tal.sections import Evaluating


def detect(
    model: nn.Module,
    clips: Clips,
    config: Config,
    classes: Sequence[str],
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Detections], dict[str, str]]:
    """Detections of all videos, the same in every process.

    Args:
        model: The detector, or what wraps it.
        clips: Of the subset, not for training.
        config: The experiment.
        classes: Names of the data set's classes.
        world: The processes; each has videos of its own.
        progress: Called with how many of this process's clips are done, and how many there are.

    Returns:
        Detections by video; reasons by the path of files that could not be read.
    """
    mine = set(world.share([video.id for video in clips.videos]))
    items = [i for i in range(len(clips)) if clips.video_of(i) in mine]
    windows, skipped = _windows(model, clips, items, config, world, progress)
    scores = video_scores(config.evaluation, classes, clips)
    durations = {video.id: video.duration for video in clips.videos}
    found = {key: of_video(parts, config, durations[key], scores.get(key)) for key, parts in windows.items()}
    together: dict[str, Detections] = {}
    faults: dict[str, str] = {}
    for others, reasons in world.gathered((found, skipped)):
        together |= others
        faults |= reasons
    return {video.id: together[video.id] for video in clips.videos if video.id in together}, faults


def detect_in_file(
    path: Path, model: nn.Module, config: Config, classes: Sequence[str], world: World
) -> tuple[Detections, float]:
    """Detections of one video file, and its length in seconds. Arguments as for `detect`.

    Raises:
        Re2TALError: the file cannot be read.
    """
    with open_video(path, decoder=config.data.decoder) as reader:
        duration, count = reader.duration, len(reader)
    # a data set of this one video, without actions
    video = AnnotatedVideo(path.stem, "one", duration, None, count, ())
    clips = Clips(
        Annotations({video.id: video}, tuple(classes)),
        video.subset,
        path.parent,
        decoder=config.data.decoder,
        **config.clip.arguments(),
    )
    found, skipped = detect(model, clips, config, classes, world)
    if video.id not in found:
        raise Re2TALError(f"{path}: {skipped.get(str(path), 'nothing could be read')}")
    return found[video.id], duration


def _windows(
    model: nn.Module,
    clips: Clips,
    items: list[int],
    config: Config,
    world: World,
    progress: Callable[[int, int], None] | None,
) -> tuple[Mapping[str, list[Detections]], dict[str, str]]:
    """Candidates of each clip, in seconds, by video; and the files that could not be read."""
    settings, dtype = config.evaluation, AMP[config.optim.amp]
    loader = DataLoader(
        Subset(clips, items),
        settings.batch,
        num_workers=config.loader.workers if items else 0,
        collate_fn=collate,
    )
    windows: defaultdict[str, list[Detections]] = defaultdict(list)
    skipped: dict[str, str] = {}
    done, was_training = 0, model.training
    model.eval()
    with gathered_weights(model), torch.inference_mode():
        for batch in loader:
            skipped |= dict(batch.skipped)
            done += len(batch) + len(batch.skipped)
            if len(batch):
                with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                    predictions = model(batch.frames.to(world.device), batch.mask.to(world.device))
                best = candidates(predictions, threshold=settings.threshold, topk=settings.topk)
                for key, grid, clip in zip(batch.videos, batch.grids, best, strict=True):
                    windows[key].append(in_seconds(clip, grid, settings))
            if progress is not None:
                progress(done, len(items))
    model.train(was_training)
    return windows, skipped


def in_seconds(clip: Candidates, grid: TimeGrid, settings: Evaluating) -> Detections:
    """Candidates in seconds, not cut to the video; in OpenTAD's precision where its rounding is wanted."""
    positions = clip.segments.astype(np.float32) if settings.dialect == "opentad" else clip.segments
    return Detections.of(grid.moments(positions), clip.scores, clip.labels)


def of_video(
    windows: Sequence[Detections], config: Config, duration: float, scores: NDArray[np.float64] | None = None
) -> Detections:
    """A video's detections out of the candidates of its clips: soft-NMS, then votes and classes of the video if set.

    Args:
        windows: The candidates of each clip in seconds, not cut to the video.
        config: The experiment.
        duration: The video's length in seconds.
        scores: (classes,) Another network's of the whole video, where only actions are told from background.
    """
    settings, agnostic = config.evaluation, config.data.class_agnostic
    in_windows, rounds = config.clip.sampling == "window", settings.dialect == "opentad"
    if in_windows or not rounds:
        windows = [window.within(duration) for window in windows]
    if in_windows and rounds:
        windows = [window.rounded() for window in windows]
    before = joined(windows)
    found = soft_nms(
        before,
        sigma=settings.sigma,
        min_score=settings.min_score,
        multiclass=not agnostic,
        limit=settings.limit,
    )
    if agnostic and settings.voting is not None:
        found = vote(found, before, threshold=settings.voting, weight=settings.vote_weight)
    found = found.within(duration)
    if scores is not None:
        found = with_video_classes(found, scores, rule=settings.video_rule)
    return found.rounded() if rounds else found


def video_scores(
    settings: Evaluating, classes: Sequence[str], clips: Clips
) -> dict[str, NDArray[np.float64]]:
    """What another network says of whole videos, by id; empty where the settings name none.

    Raises:
        Re2TALError: it says nothing of one of them.
    """
    if settings.video_classes is None:
        return {}
    scores = read_video_classes(settings.video_classes, classes)
    found = {
        video.id: scores.get(video.id, scores.get(video.id.removeprefix("v_"))) for video in clips.videos
    }
    if missing := [key for key, row in found.items() if row is None]:
        raise Re2TALError(
            f"{settings.video_classes} has no scores of {len(missing)} videos, such as {missing[0]}; leave them out by "
            "data.blocked, or give another evaluation.video_classes"
        )
    return {key: row for key, row in found.items() if row is not None}
