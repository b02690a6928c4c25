"""Average precision of temporal action localization, as ActivityNet's evaluation code computes it.

For one class, the detections of all videos go by falling score. At a tIoU threshold, each looks through the actions
of its video by falling tIoU; the first that is still free and overlaps enough makes it a true positive. (One whose
best action is taken may take another: COCO's rule is harsher.) The average precision is the area under precision
over recall, precision made monotonic (VOC 2011). mAP is its mean over the classes that the subset has actions of.

Detections of videos that the subset does not have, or of classes that a video has no action of, are false positives.
Of detections of equal score the one that stands last goes first: the official code reverses a sort by rising score,
which leaves their order to numpy; here that sort is stable.

Actions are all entries of the file, also those that are listed twice, have no length or lie outside of their video:
each is one more to find. The tIoU of an action and a detection that both have no length is 0 / 0; the official code
asks whether it is below the threshold, so they match.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.re2tal.data.annotations import AnnotationError
from examples.re2tal.evaluation.postprocess import tiou as overlap_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from examples.re2tal.data.annotations import AnnotatedVideo, Annotations
    from examples.re2tal.evaluation.postprocess import Detections

    Floats = NDArray[np.float64]

ACTIVITYNET = np.linspace(0.5, 0.95, 10)
THUMOS = np.linspace(0.3, 0.7, 5)


@dataclass(frozen=True)
class Evaluation:
    """How good detections are.

    Attributes:
        tiou: (thresholds,)
        classes: Those that the subset has actions of.
        ap: (thresholds, classes) Average precision.
    """

    tiou: Floats
    classes: tuple[str, ...]
    ap: Floats

    @classmethod
    def of(cls, matched: Mapping[str, Matches], tiou: Floats) -> Evaluation:
        """From what `match` returns, at the thresholds that it was given."""
        ap = np.array([matches.average_precision() for matches in matched.values()])
        return cls(np.asarray(tiou), tuple(matched), ap.reshape(-1, len(tiou)).T)

    @property
    def mAP(self) -> Floats:  # noqa: N802  # the field's name
        """(thresholds,) Mean over the classes."""
        mean: Floats = self.ap.mean(axis=1)
        return mean

    @property
    def average_mAP(self) -> float:  # noqa: N802
        """Mean over thresholds and classes."""
        return float(self.mAP.mean())


@dataclass(frozen=True)
class Matches:
    """The detections of one class, by falling score, against its actions.

    Attributes:
        scores: (detections,)
        positive: (thresholds, detections) Which are true positives.
        actions: How many there are to find.
        sources: The video of each, and its place among the video's detections.
    """

    scores: Floats
    positive: NDArray[np.bool_]
    actions: int
    sources: tuple[tuple[str, int], ...]

    def curves(self) -> tuple[Floats, Floats]:
        """Precision and recall after each detection, (thresholds, detections)."""
        hits = self.positive.cumsum(axis=1)
        return hits / np.arange(1, hits.shape[1] + 1), hits / self.actions

    def average_precision(self) -> Floats:
        """(thresholds,), one for each threshold."""
        return np.array([average_precision(p, r) for p, r in zip(*self.curves(), strict=True)])


def evaluate(
    truth: Annotations,
    results: Mapping[str, Detections],
    *,
    subset: str,
    tiou: Floats = ACTIVITYNET,
    drop_duplicates: bool = False,
) -> Evaluation:
    """MAP of detections of a subset.

    Args:
        truth: The annotations.
        results: Detections by video, with labels that index `truth.classes`. What is found in videos that the subset
            does not have is false; only blocked videos are left out.
        subset: Which videos count.
        tiou: (thresholds,)
        drop_duplicates: As OpenTAD, count actions of one label whose ends differ by less than a millisecond once, and
            those of no length not at all; the official code counts each.

    Raises:
        AnnotationError: the annotations have no such subset, or it has no actions.
    """
    matched = match(truth, results, subset=subset, tiou=tiou, drop_duplicates=drop_duplicates)
    return Evaluation.of(matched, tiou)


def match(
    truth: Annotations,
    results: Mapping[str, Detections],
    *,
    subset: str,
    tiou: Floats,
    drop_duplicates: bool = False,
) -> dict[str, Matches]:
    """Each class that the subset has actions of, with its detections matched. Arguments as for `evaluate`."""
    actions = _actions(truth.subset(subset), drop_duplicates=drop_duplicates)
    if not actions:
        raise AnnotationError(f"the videos of the subset {subset!r} have no actions to evaluate against")
    results = {key: detections for key, detections in results.items() if key not in truth.blocked}
    return {
        name: _matches(label, actions[name], results, np.asarray(tiou, dtype=np.float64))
        for label, name in enumerate(truth.classes)
        if name in actions
    }


def average_precision(precision: Floats, recall: Floats) -> float:
    """Area under a curve of precision over recall, precision made monotonic from the right (VOC 2011)."""
    precision = np.concatenate([[0.0], precision, [0.0]])
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())


def recall_at(
    truth: Annotations,
    results: Mapping[str, Detections],
    *,
    subset: str,
    tiou: Floats,
    times: Sequence[int] = (1, 5),
    drop_duplicates: bool = False,
    by_class: bool = False,
) -> Floats:
    """Recall@kx, (times, thresholds): of each video and class with n actions, the best `k * n` detections are kept.

    Args:
        truth: The annotations.
        results: Detections by video, the best first.
        subset: Which videos count.
        tiou: (thresholds,)
        times: The factors k.
        drop_duplicates: See `evaluate`.
        by_class: The mean of the classes' recalls, as OpenTAD; else all actions count the same.
    """
    index = {name: i for i, name in enumerate(truth.classes)}
    actions = _actions(truth.subset(subset), drop_duplicates=drop_duplicates)
    found, total = np.zeros((len(actions), len(times), len(tiou))), np.zeros((len(actions), 1, 1))
    for row, (name, by_video) in enumerate(actions.items()):
        for key, segments in by_video.items():
            total[row] += len(segments)
            if key not in results:
                continue
            chosen = results[key].segments[results[key].labels == index[name]]
            for column, k in enumerate(times):
                overlap = overlap_of(chosen[: k * len(segments), None], segments[None])
                best = overlap.max(axis=0, initial=0.0)
                found[row, column] += (best[:, None] >= tiou).sum(axis=0)
    if by_class:
        recalls: Floats = (found / np.maximum(total, 1)).sum(axis=0) / max(1, len(actions))
        return recalls
    pooled: Floats = found.sum(axis=0) / max(1, total.sum())
    return pooled


def _actions(videos: Sequence[AnnotatedVideo], *, drop_duplicates: bool) -> dict[str, dict[str, Floats]]:
    """Segments (actions, 2) by class and video."""
    listed: defaultdict[str, defaultdict[str, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for video in videos:
        for action in video.entries:
            segment, there = (action.start, action.end), listed[action.label][video.id]
            void = action.end <= action.start or any(_same(segment, other) for other in there)
            if not (drop_duplicates and void):
                there.append(segment)
    found = {
        name: {key: np.array(segments) for key, segments in by_video.items() if segments}
        for name, by_video in listed.items()
    }
    return {name: by_video for name, by_video in found.items() if by_video}


def _same(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-3


def _matches(
    label: int, actions: Mapping[str, Floats], results: Mapping[str, Detections], tiou: Floats
) -> Matches:
    scores, positive = [np.empty(0)], [np.empty((len(tiou), 0), dtype=bool)]
    sources: list[tuple[str, int]] = []
    for key, detections in results.items():
        chosen = np.flatnonzero(detections.labels == label)
        own = detections.scores[chosen]
        hits = np.empty((len(tiou), len(own)), dtype=bool)
        # a detection competes with those of its own video alone, so videos can be matched one by one
        order = _falling(own)
        hits[:, order] = _greedy(detections.segments[chosen[order]], actions.get(key), tiou)
        scores.append(own)
        positive.append(hits)
        sources += [(key, int(i)) for i in chosen]
    together = np.concatenate(scores)
    order = _falling(together)
    total = sum(len(segments) for segments in actions.values())
    ordered = tuple(sources[i] for i in order)
    return Matches(together[order], np.concatenate(positive, axis=1)[:, order], total, ordered)


def _falling(scores: Floats) -> NDArray[np.intp]:
    """Order of falling scores; of equal ones the last goes first."""
    return np.argsort(scores, kind="stable")[::-1]


def _greedy(segments: Floats, actions: Floats | None, tiou: Floats) -> NDArray[np.bool_]:
    """(thresholds, detections) Which detections of one video, by falling score, are true positives."""
    positive = np.zeros((len(tiou), len(segments)), dtype=bool)
    if actions is None:
        return positive
    overlaps = overlap_of(segments[:, None], actions[None])
    lengths = np.diff(segments) + np.diff(actions).T
    overlaps[(lengths == 0) & (overlaps == 0)] = np.inf  # 0 / 0, see the module
    # the official code goes through actions by argsort()[::-1]: of equal tIoU the later first
    orders = np.argsort(overlaps, axis=1, kind="stable")[:, ::-1]
    thresholds = np.arange(len(tiou))
    free = np.ones((len(tiou), len(actions)), dtype=bool)
    for i in np.flatnonzero(overlaps.max(axis=1) >= tiou.min()):
        able = (overlaps[i] >= tiou[:, None]) & free
        ranked = able[:, orders[i]]
        chosen = orders[i][ranked.argmax(axis=1)]
        hit = ranked.any(axis=1)
        positive[hit, i] = True
        free[thresholds[hit], chosen[hit]] = False
    return positive
