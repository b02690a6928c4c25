"""From a head's candidates to a video's detections, and the file that evaluation servers take.

The windows of a video are put together in seconds, then repetitions are thinned out once (soft-NMS: Bodla et al.,
2017). Nothing is rounded on the way, if not asked for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.re2tal.errors import Re2TALError
from revwire.checkpoint.disk import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WEIGHTS = ("score*iou", "score")
RULES = ("product", "sqrt")


@dataclass(frozen=True)
class Detections:
    """What is said to happen in a video.

    Attributes:
        segments: (detections, 2) Starts and ends in seconds.
        scores: (detections,) The best first.
        labels: (detections,) Indices of classes.
    """

    segments: Floats
    scores: Floats
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, segments: Any, scores: Any, labels: Any) -> Detections:
        """Detections in any order; equal scores keep theirs."""
        scores = np.asarray(scores, dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        segments = np.asarray(segments, dtype=np.float64).reshape(-1, 2)
        return cls(segments[order], scores[order], np.asarray(labels, dtype=np.int64)[order])

    def __len__(self) -> int:
        """How many there are."""
        return len(self.scores)

    def surest(self, threshold: float) -> Detections:
        """Those of at least this score."""
        sure = self.scores >= threshold
        return Detections(self.segments[sure], self.scores[sure], self.labels[sure])

    def within(self, duration: float) -> Detections:
        """The same, cut to a video of so many seconds."""
        return Detections(np.clip(self.segments, 0.0, duration), self.scores, self.labels)

    def rounded(self) -> Detections:
        """The same with hundredths of seconds and scores of four digits, as OpenTAD writes them."""
        return Detections(np.round(self.segments, 2), np.round(self.scores, 4), self.labels)


def tiou(one: Floats, many: Floats) -> Floats:
    """Temporal intersection over union of segments (..., 2) with segments (..., 2), broadcast."""
    overlap = np.minimum(one[..., 1], many[..., 1]) - np.maximum(one[..., 0], many[..., 0])
    overlap = np.maximum(overlap, 0.0)
    union = (one[..., 1] - one[..., 0]) + (many[..., 1] - many[..., 0]) - overlap
    out: Floats = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return out


def gather(windows: Sequence[Detections]) -> Detections:
    """All windows of a video."""
    together = joined(windows)
    return Detections.of(together.segments, together.scores, together.labels)


def joined(windows: Sequence[Detections]) -> Detections:
    """All windows of a video, one after the other and not by score: the order that soft-NMS breaks ties by."""
    if not windows:
        return Detections.of([], [], [])
    return Detections(
        np.concatenate([w.segments for w in windows]),
        np.concatenate([w.scores for w in windows]),
        np.concatenate([w.labels for w in windows]),
    )


def soft_nms(
    detections: Detections,
    *,
    sigma: float = 0.5,
    min_score: float = 0.001,
    multiclass: bool = True,
    limit: int = 2000,
) -> Detections:
    """Lower the score of what overlaps with something better, by `exp(-tIoU**2 / sigma)`.

    Args:
        detections: Of one video.
        sigma: How wide the Gaussian is (ActionFormer: 0.5, Re2TAL: 0.7).
        min_score: What falls below is left out.
        multiclass: Only what has the same label is a repetition.
        limit: How many are kept, the best.
    """
    groups = np.unique(detections.labels) if multiclass else [None]
    parts = []
    for label in groups:
        chosen = slice(None) if label is None else detections.labels == label
        parts.append(
            _soft_nms(
                detections.segments[chosen],
                detections.scores[chosen],
                detections.labels[chosen],
                sigma,
                min_score,
            )
        )
    found = gather(parts)
    return Detections(found.segments[:limit], found.scores[:limit], found.labels[:limit])


def _soft_nms(
    segments: Floats, scores: Floats, labels: NDArray[np.int64], sigma: float, min_score: float
) -> Detections:
    keep = scores >= min_score
    segments, scores, labels = segments[keep], scores[keep].copy(), labels[keep]
    order, size, picked = np.arange(len(scores)), len(scores), 0
    while picked < size:
        # picked ones change places with the best, dropped ones with the last: so the compiled code of the references
        # does it, and it decides which of two equal scores goes first
        best = picked + int(np.argmax(scores[order[picked:size]]))
        order[[picked, best]] = order[[best, picked]]
        left = order[picked + 1 : size]
        scores[left] *= np.exp(-(tiou(segments[order[picked]], segments[left]) ** 2) / sigma)
        picked += 1
        size = picked + _filled(left, scores[left] >= min_score)
    return Detections.of(segments[order[:size]], scores[order[:size]], labels[order[:size]])


def _filled(left: NDArray[np.int64], stay: NDArray[np.bool_]) -> int:
    """Put the last ones that stay into the places of those that do not, in place; returns how many stay."""
    count = int(stay.sum())
    holes, last = np.flatnonzero(~stay[:count]), np.flatnonzero(stay[count:])[::-1] + count
    left[holes] = left[last]
    return count


def vote(
    detections: Detections, before: Detections, *, threshold: float = 0.7, weight: str = "score*iou"
) -> Detections:
    """Move each boundary to the weighted mean of all candidates that overlap with its detection.

    For class-agnostic detections; labels are not looked at.

    Args:
        detections: After non-maximum suppression.
        before: The candidates before it, of the same video.
        threshold: The least tIoU of a candidate that votes.
        weight: `"score*iou"` (ActionFormer) or `"score"` (OpenTAD).

    Raises:
        Re2TALError: there is no such weight.
    """
    if weight not in WEIGHTS:
        raise Re2TALError(f"votes are weighted by {' or '.join(WEIGHTS)}, not by {weight!r}")
    overlap = tiou(detections.segments[:, None], before.segments[None])
    weights = np.where(overlap >= threshold, before.scores, 0.0)
    if weight == "score*iou":
        weights = weights * overlap
    total = weights.sum(axis=1, keepdims=True)
    voted = np.divide(weights @ before.segments, total, out=detections.segments.copy(), where=total > 0)
    return Detections(voted, detections.scores, detections.labels)


def with_video_classes(
    detections: Detections, scores: Floats, *, top: int = 2, rule: str = "product"
) -> Detections:
    """Class-agnostic detections under the best classes of the whole video, as another network sees them.

    Args:
        detections: Of one video.
        scores: (classes,) The video's, from 0 to 1.
        top: How many of its classes are taken.
        rule: `"product"` of both scores, or its `"sqrt"` (ActionFormer).

    Raises:
        Re2TALError: there is no such rule.
    """
    if rule not in RULES:
        raise Re2TALError(f"scores are joined by {' or '.join(RULES)}, not by {rule!r}")
    best = np.argsort(-scores, kind="stable")[:top]
    joined = detections.scores[None] * scores[best, None]
    joined = np.sqrt(joined) if rule == "sqrt" else joined
    labels = np.repeat(best, len(detections))
    return Detections.of(np.tile(detections.segments, (len(best), 1)), joined.ravel(), labels)


def read_video_classes(path: str | Path, classes: Sequence[str]) -> dict[str, Floats]:
    """Scores of whole videos, by id, in the order of `classes`.

    The file is `{"results": {id: [score, ...]}, "class": [name, ...]}`; ids may lack the `v_`.

    Raises:
        Re2TALError: it is not, or lacks a class.
    """
    data = _json(path)
    names, results = data.get("class"), data.get("results")
    if not isinstance(names, list) or not isinstance(results, dict):
        raise Re2TALError(f'{path} is not {{"results": {{id: scores}}, "class": names}}')
    if missing := sorted(set(classes) - set(names)):
        raise Re2TALError(f"{path} has no scores of {', '.join(missing[:5])}")
    order, found = [names.index(name) for name in classes], {}
    for key, scores in results.items():
        if not isinstance(scores, list) or len(scores) != len(names):
            raise Re2TALError(f"{path}: results.{key} is no list of a score for each of {len(names)} classes")
        found[key] = np.asarray(scores, dtype=np.float64)[order]
    return found


def write_submission(path: str | Path, results: Mapping[str, Detections], classes: Sequence[str]) -> None:
    """Write detections as ActivityNet's evaluation takes them."""
    found = {
        key: [
            {"label": classes[label], "segment": [float(start), float(end)], "score": float(score)}
            for (start, end), score, label in zip(d.segments, d.scores, d.labels, strict=True)
        ]
        for key, d in results.items()
    }
    data = {"version": "VERSION 1.3", "results": found, "external_data": {}}
    write_text(Path(path), json.dumps(data))


def read_submission(path: str | Path, classes: Sequence[str]) -> tuple[dict[str, Detections], int]:
    """Detections by video, and how many were left out because the classes do not have their label.

    Raises:
        Re2TALError: the file is not as it must be; the message names the entry.
    """
    results = _json(path).get("results")
    if not isinstance(results, dict):
        raise Re2TALError(f'{path} has no "results" by video')
    index = {name: i for i, name in enumerate(classes)}
    found, unknown = {}, 0
    for key, entries in results.items():
        if not isinstance(entries, list):
            raise Re2TALError(f"{path}: results.{key} is {type(entries).__name__}, not a list of detections")
        rows = [_row(entry, f"{path}: results.{key}[{i}]") for i, entry in enumerate(entries)]
        known = [row for row in rows if row[0] in index]
        unknown += len(rows) - len(known)
        labels = [index[label] for label, _, _ in known]
        found[key] = Detections.of([s for _, s, _ in known], [p for _, _, p in known], labels)
    return found, unknown


def _row(entry: Any, where: str) -> tuple[str, tuple[float, float], float]:
    try:
        label, (start, end), score = entry["label"], entry["segment"], entry["score"]
        row = str(label), (float(start), float(end)), float(score)
    except (TypeError, KeyError, ValueError):
        raise Re2TALError(
            f'{where} is {entry!r}, not {{"label", "segment": [start, end], "score"}}'
        ) from None
    if not all(math.isfinite(number) for number in (*row[1], row[2])):
        raise Re2TALError(f"{where} holds a number that is not finite")
    return row


def _json(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Re2TALError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise Re2TALError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Re2TALError(f"{path} is no object of JSON")
    return data
