"""Why detections are wrong: the false-positive profile of DETAD (Alwassel et al., ECCV 2018).

Of each class with `n` actions the best `10 * n` detections are looked at, in ten ranks of `n`. One that matches no
action is, in this order,

- *duplicate*: it overlaps enough with an action of its class, which a better detection has found;
- *wrong label*: it overlaps enough with an action of another class;
- *localization*: it overlaps a little with one of its class;
- *confusion*: it overlaps a little with one of another class;
- *background*: it overlaps with none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from examples.re2tal.evaluation.metrics import match
from examples.re2tal.evaluation.postprocess import tiou as overlap_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
    from examples.re2tal.evaluation.postprocess import Detections

KINDS = ("true positive", "duplicate", "wrong label", "localization", "confusion", "background")
RANKS = 10
LITTLE = 0.1
"""The tIoU from which a detection overlaps a little."""


def profile(
    truth: Annotations, results: Mapping[str, Detections], *, subset: str, tiou: float = 0.5
) -> NDArray[np.float64]:
    """(RANKS, KINDS) Which part of the detections of each rank is of each kind, all classes together.

    Args:
        truth: The annotations.
        results: Detections by video.
        subset: Which videos count.
        tiou: How much overlap is enough.
    """
    counts = np.zeros((RANKS, len(KINDS)))
    videos = {video.id: video for video in truth.subset(subset)}
    for name, matches in match(truth, results, subset=subset, tiou=np.array([tiou])).items():
        label = truth.classes.index(name)
        kinds = _kinds(label, name, results, videos, truth, tiou)
        for place, positive in enumerate(matches.positive[0][: RANKS * matches.actions]):
            video, index = matches.sources[place]
            kind = 0 if positive else kinds[video][index]
            counts[place // matches.actions, kind] += 1
    total = counts.sum(axis=1, keepdims=True)
    parts: NDArray[np.float64] = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    return parts


def _kinds(
    label: int,
    name: str,
    results: Mapping[str, Detections],
    videos: Mapping[str, AnnotatedVideo],
    truth: Annotations,
    tiou: float,
) -> dict[str, dict[int, int]]:
    """What each detection of a class is if it matches nothing, by video and its place there."""
    kinds: dict[str, dict[int, int]] = {}
    for key, detections in results.items():
        if key in truth.blocked:
            continue
        actions = videos[key].entries if key in videos else ()
        own, others = (_segments(actions, name, same=same) for same in (True, False))
        chosen = np.flatnonzero(detections.labels == label)
        kinds[key] = {
            int(i): _kind(_most(detections.segments[i], own), _most(detections.segments[i], others), tiou)
            for i in chosen
        }
    return kinds


def _kind(own: float, other: float, enough: float) -> int:
    if own >= enough:
        return KINDS.index("duplicate")
    if other >= enough:
        return KINDS.index("wrong label")
    if own >= LITTLE:
        return KINDS.index("localization")
    return KINDS.index("confusion" if other >= LITTLE else "background")


def _segments(actions: tuple[Action, ...], name: str, *, same: bool) -> NDArray[np.float64]:
    chosen = [(a.start, a.end) for a in actions if (a.label == name) is same]
    return np.array(chosen, dtype=np.float64).reshape(-1, 2)


def _most(segment: NDArray[np.float64], segments: NDArray[np.float64]) -> float:
    return float(overlap_of(segment, segments).max(initial=0.0))
