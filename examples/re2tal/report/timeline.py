"""The detections of one video as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from examples.re2tal.evaluation.postprocess import Detections


def draw(path: Path, detections: Detections, classes: tuple[str, ...], duration: float) -> None:
    """A timeline: one row for each class that was found, the surer the darker."""
    from matplotlib.figure import Figure

    rows = sorted(set(detections.labels.tolist()))
    figure = Figure(figsize=(9, 0.6 * max(1, len(rows)) + 0.8), layout="constrained")
    axes: Any = figure.subplots()
    for (start, end), score, label in zip(
        detections.segments, detections.scores, detections.labels, strict=True
    ):
        axes.barh(rows.index(int(label)), end - start, left=start, height=0.7, alpha=float(score), color="C0")
    axes.set_yticks(range(len(rows)), [classes[label] for label in rows])
    axes.set_xlim(0, duration)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
