"""An evaluation as one self-contained HTML page: how good, at what, why not better, and what it looks like in videos.

`template.html`, `style.css` and `script.js` lie beside this file; the page loads nothing. What it draws is in it as
JSON, and `script.js` draws it.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.re2tal.data.dataset import found_files
from examples.re2tal.data.video import VideoError, open_video, shown_at
from examples.re2tal.evaluation.diagnosis import KINDS, profile
from examples.re2tal.evaluation.metrics import Evaluation, match
from revwire.checkpoint.disk import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from examples.re2tal.data.annotations import AnnotatedVideo, Annotations
    from examples.re2tal.evaluation.metrics import Matches
    from examples.re2tal.evaluation.postprocess import Detections

_SHOWN = 8  # videos on the page
_THUMBNAILS = 8  # pictures of each
_HIGH = 72  # pixels, of a picture
_LEAST = 0.1  # score of a detection that is shown
_CORNERS = 80  # of a curve: more cannot be told apart


def write_report(
    path: str | Path,
    truth: Annotations,
    results: Mapping[str, Detections],
    *,
    subset: str,
    tiou: np.ndarray[Any, np.dtype[np.float64]],
    videos: str | Path | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "Temporal action localization",
) -> Evaluation:
    """Evaluate, and write the page.

    Args:
        path: The HTML file.
        truth: The annotations.
        results: Detections by video.
        subset: Which videos count.
        tiou: (thresholds,)
        videos: Folder of the video files, for thumbnails.
        history: Lines of a training's log, for its loss.
        title: The page's.

    Returns:
        The evaluation.
    """
    found = match(truth, results, subset=subset, tiou=tiou)
    evaluation = Evaluation.of(found, tiou)
    middle = float(tiou[np.abs(tiou - 0.5).argmin()])
    data = {
        "tiou": [round(float(t), 4) for t in tiou],
        "classes": list(evaluation.classes),
        "ap": evaluation.ap.T.tolist(),
        "curves": [_curves(matches) for matches in found.values()],
        "kinds": KINDS,
        "profile": profile(truth, results, subset=subset, tiou=middle).tolist(),
        "profile_tiou": middle,
        "videos": _samples(truth, results, subset, None if videos is None else Path(videos)),
        "history": [[line["step"], line["loss"]] for line in history if "loss" in line],
    }
    beside = Path(__file__).parent
    page = Template((beside / "template.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=(beside / "style.css").read_text(encoding="utf-8"),
        script=(beside / "script.js").read_text(encoding="utf-8"),
        average=f"{evaluation.average_mAP:.3f}",
        facts=_facts(truth, results, subset, found),
        # in a script element "</script" ends the text, and "<!--<script" changes what does
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    write_text(Path(path), page)
    return evaluation


def _facts(
    truth: Annotations, results: Mapping[str, Detections], subset: str, found: Mapping[str, Matches]
) -> str:
    facts = {
        "videos": len(truth.subset(subset)),
        "actions": sum(matches.actions for matches in found.values()),
        "classes": len(found),
        "detections": sum(len(detections) for detections in results.values()),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{value:,}</dd></div>" for name, value in facts.items())


def _curves(matches: Matches) -> list[list[list[float]]]:
    """For each threshold, the corners of precision over recall, made monotonic from the right: (recall, precision).

    There is one for every true positive, or for as many as can be seen: recall changes nowhere else.
    """
    curves = []
    for hits, precision, recall in zip(matches.positive, *matches.curves(), strict=True):
        rising = np.maximum.accumulate(precision[::-1])[::-1]
        corners = np.flatnonzero(hits)
        if len(corners) > _CORNERS:
            corners = corners[np.linspace(0, len(corners) - 1, _CORNERS).astype(int)]
        curves.append([[round(float(recall[i]), 4), round(float(rising[i]), 4)] for i in corners])
    return curves


def _samples(
    truth: Annotations, results: Mapping[str, Detections], subset: str, folder: Path | None
) -> list[dict[str, Any]]:
    """Some videos evenly picked, with their actions, what was detected, and pictures."""
    every = [video for video in truth.subset(subset) if video.actions]
    chosen = (
        [every[i] for i in np.unique(np.linspace(0, len(every) - 1, _SHOWN).astype(int))] if every else []
    )
    paths = found_files(chosen, folder)[0] if folder is not None else {}
    samples = []
    for video in chosen:
        detections = results.get(video.id)
        sure = [] if detections is None else detections.surest(_LEAST)
        samples.append(
            {
                "id": video.id,
                "duration": video.duration,
                "actions": [[a.start, a.end, a.label] for a in video.actions],
                "found": [
                    [round(float(s), 3), round(float(e), 3), truth.classes[k], round(float(p), 4)]
                    for (s, e), k, p in zip(sure.segments, sure.labels, sure.scores, strict=True)
                ]
                if sure
                else [],
                "pictures": _thumbnails(video, paths.get(video.id)),
            }
        )
    return samples


def _thumbnails(video: AnnotatedVideo, path: Path | None) -> list[str]:
    """Pictures of a video as data URIs; none where it cannot be read."""
    if path is None:
        return []
    from PIL import Image

    moments = (np.arange(_THUMBNAILS) + 0.5) * video.duration / _THUMBNAILS
    try:
        with open_video(path) as reader:
            first = reader.read([0])
            size = _HIGH, max(1, round(_HIGH * first.shape[2] / first.shape[1]))
            pictures = reader.read(shown_at(reader.times, moments).tolist(), size)
    except VideoError:
        return []
    uris = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=80)
        uris.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris
