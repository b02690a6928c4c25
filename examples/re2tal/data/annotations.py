"""Annotation files: which actions happen when, in which videos.

All data sets of the field share one layout, `{"database": {video id: {"subset", "duration", "annotations": [{"label",
"segment": [start, end]}]}}}`, times in seconds, and differ in what stands beside it:

- ActivityNet-1.3: no frame rate; `testing` videos have no annotations; files are called `v_<id>.mp4`.
- THUMOS-14 after ActionFormer: `fps`, `label_id`, and the subsets `Validation` (for training) and `Test`.
- THUMOS-14 after OpenTAD: `frame`, the number of frames, and the subsets `training` and `validation`; class names in
  a text file, one a line.

In THUMOS-14 a segment may carry two classes (CliffDiving is a kind of Diving), as two entries; segments that nobody
could name carry `Ambiguous`, which is neither trained on nor evaluated.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

IGNORED = ("Ambiguous",)
_MOST_CLASSES = 100_000
"""The largest data sets of video have some thousands."""
_LARGEST = 1e12
"""Of a time, a rate or a number of frames."""


class AnnotationError(Re2TALError):
    """An annotation file is not as it must be; the message names the entry."""


@dataclass(frozen=True)
class Action:
    """One action: `start` and `end` in seconds, and its class."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class AnnotatedVideo:
    """One video and its actions.

    Attributes:
        id: Its name in the annotation file.
        subset: Which part of the data set it belongs to.
        duration: Its length in seconds.
        fps: Frames per second, None where the file does not tell.
        frames: Number of frames, None where the file does not tell.
        entries: What the file lists, in its order. Evaluation counts all of it, as the official code does.
    """

    id: str
    subset: str
    duration: float
    fps: float | None
    frames: int | None
    entries: tuple[Action, ...]

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """What there is to learn, by start: entries that last some time, lie in the video and repeat none."""
        sound = {action for action in self.entries if not _fault(action, self.duration)}
        return tuple(sorted(sound, key=lambda action: (action.start, action.end, action.label)))


@dataclass(frozen=True)
class Annotations:
    """A data set's annotations.

    Attributes:
        videos: By id, in the file's order.
        classes: Names of the classes; a label's index is its place here.
        version: What the file calls itself.
        dropped: How many videos and entries were left out, by reason.
        faulty: How many entries are not trained on, by reason; see `AnnotatedVideo.actions`.
        blocked: Ids of videos that were left out.
    """

    videos: Mapping[str, AnnotatedVideo]
    classes: tuple[str, ...]
    version: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    faulty: Mapping[str, int] = field(default_factory=dict)
    blocked: frozenset[str] = frozenset()

    def subset(self, name: str) -> tuple[AnnotatedVideo, ...]:
        """The videos of one subset, in the file's order.

        Raises:
            AnnotationError: no video has it.
        """
        found = tuple(video for video in self.videos.values() if video.subset == name)
        if not found:
            there = ", ".join(sorted({repr(video.subset) for video in self.videos.values()})) or "no videos"
            raise AnnotationError(f"no video of the subset {name!r}; the file has {there}")
        return found


def read_annotations(
    path: str | Path,
    *,
    classes: str | Path | None = None,
    blocked: str | Path | None = None,
    ignored: Collection[str] = IGNORED,
) -> Annotations:
    """Read an annotation file in any of the dialects above.

    Entries of no length, those that repeat another one, and those outside of their video are counted: there is
    nothing to learn from them, but the official evaluation has them in its number of actions.

    Args:
        path: The JSON file.
        classes: A text file with one class name a line, whose order gives the indices. Without it the file's own
            `label_id` does, or the sorted names.
        blocked: A JSON list of ids of videos to leave out, as ActivityNet has for videos that are gone.
        ignored: Labels to leave out.

    Raises:
        AnnotationError: an entry is not as it must be; the message names it.
    """
    data = _object(_json(Path(path)), f"{path}")
    database = _object(data.get("database"), f"{path}: database")
    gone = frozenset(_strings(_json(Path(blocked)), str(blocked))) if blocked is not None else frozenset()
    dropped: Counter[str] = Counter()
    ids: dict[str, int] = {}
    videos = {}
    for key, entry in database.items():
        if key in gone:
            dropped["blocked videos"] += 1
            continue
        where = f"{path}: database.{key}"
        videos[key] = _video(key, _object(entry, where), where, frozenset(ignored), ids, dropped)
    names = _classes(videos, ids, classes)
    return Annotations(videos, names, str(data.get("version", "")), dict(dropped), _faults(videos), gone)


def _video(
    key: str,
    entry: Mapping[str, Any],
    where: str,
    ignored: frozenset[str],
    ids: dict[str, int],
    dropped: Counter[str],
) -> AnnotatedVideo:
    duration = _number(entry.get("duration"), f"{where}.duration")
    if duration <= 0:
        raise AnnotationError(f"{where}.duration is {duration}, not a length in seconds")
    subset = entry.get("subset")
    if not isinstance(subset, str):
        raise AnnotationError(f"{where}.subset is {subset!r}, not a name")
    entries = entry.get("annotations", [])
    if not isinstance(entries, list):
        raise AnnotationError(f"{where}.annotations is {type(entries).__name__}, not a list")
    listed = []
    for i, annotation in enumerate(entries):
        action, label_id = _action(annotation, f"{where}.annotations[{i}]")
        if action.label in ignored:
            dropped[f"{action.label} segments"] += 1
            continue
        listed.append(action)
        if label_id is not None and ids.setdefault(action.label, label_id) != label_id:
            before = ids[action.label]
            raise AnnotationError(
                f"{where}.annotations[{i}].label_id is {label_id}, but {action.label!r} was {before} before"
            )
    frames = None if entry.get("frame") is None else int(_number(entry["frame"], f"{where}.frame"))
    fps = None if entry.get("fps") is None else _number(entry["fps"], f"{where}.fps")
    if fps is None and frames is not None:
        fps = frames / duration
    return AnnotatedVideo(key, subset, duration, fps, frames, tuple(listed))


def _action(entry: Any, where: str) -> tuple[Action, int | None]:
    found = _object(entry, where)
    label, segment, label_id = found.get("label"), found.get("segment"), found.get("label_id")
    if not isinstance(label, str) or not label:
        raise AnnotationError(f"{where}.label is {label!r}, not a name")
    if not isinstance(segment, list) or len(segment) != 2:
        raise AnnotationError(f"{where}.segment is {segment!r}, not [start, end] in seconds")
    start, end = (_number(value, f"{where}.segment[{i}]") for i, value in enumerate(segment))
    if label_id is not None and (not isinstance(label_id, int) or label_id < 0):
        raise AnnotationError(f"{where}.label_id is {label_id!r}, not an index")
    return Action(start, end, label), label_id


def _fault(action: Action, duration: float) -> str:
    """Why there is nothing to learn from an action, empty if there is."""
    if action.end <= action.start:
        return "segments that end before they start"
    if action.start >= duration or action.end <= 0:
        return "segments outside of their video"
    return ""


def _faults(videos: Mapping[str, AnnotatedVideo]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for video in videos.values():
        counts["repeated segments"] += len(video.entries) - len(set(video.entries))
        counts.update(filter(None, (_fault(action, video.duration) for action in set(video.entries))))
    return {reason: count for reason, count in counts.items() if count}


def _classes(
    videos: Mapping[str, AnnotatedVideo], ids: Mapping[str, int], file: str | Path | None
) -> tuple[str, ...]:
    labels = {action.label for video in videos.values() for action in video.entries}
    if file is not None:
        try:
            names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise AnnotationError(f"{file}: {error.strerror}") from None
        names = [name for name in names if name]
        if missing := sorted(labels - set(names)):
            raise AnnotationError(
                f"{file} names {len(names)} classes, but not {', '.join(map(repr, missing))}, which the annotations use"
            )
        return tuple(names)
    if ids and labels <= ids.keys():
        by_index = {index: label for label, index in ids.items()}
        if len(by_index) < len(ids):
            raise AnnotationError("two classes have the same label_id")
        if max(by_index) >= _MOST_CLASSES:
            label = by_index[max(by_index)]
            raise AnnotationError(
                f"label_id of {label!r} is {ids[label]}; at most {_MOST_CLASSES} classes are read"
            )
        # an index that no segment uses still takes its place
        return tuple(by_index.get(i, f"(class {i})") for i in range(max(by_index) + 1))
    return tuple(sorted(labels))


def _json(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise AnnotationError(f"{path} is no regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not JSON: {error}") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise AnnotationError(f"{where} is {type(value).__name__}, not an object of JSON")
    return value


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AnnotationError(f"{where} is not a list of video ids")
    return value


def _number(value: Any, where: str) -> float:
    # an integer can be too large for a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise AnnotationError(f"{where} is {repr(value)[:40]}, not a number below {_LARGEST:g}")
    return float(value)
