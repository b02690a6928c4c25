"""A data set to try everything on: short videos of a moving shape that now and then does something.

Each video shows a shape that drifts over a textured, drifting background, past a disc that bounces about and means
nothing. Two to five times the shape acts: it *bounces*, *flashes* or *spins*. Kind, size and colour of the
shape, the background and every single picture say nothing about the class; only motion does. Lengths and frame rates
vary. Each video is drawn from a seed of its own, so a run that was stopped goes on where it was, and any number of
processes make the same files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CLASSES = ("bounce", "flash", "spin")
SUBSETS = ("training", "validation")
SIDE = 96
RATES = (10, 15, 20)
# seconds: how long videos and actions last, and the least time between actions
LENGTHS = (20.0, 40.0)
_ACTION = (2.0, 6.0)
_GAP = 1.0
# times a second
_FLASHES = 2.5
_BOUNCES = 0.9
_TURNS = 0.3


@dataclass(frozen=True)
class Video:
    """One video to be made: everything else follows from it."""

    id: str
    subset: str
    seed: tuple[int, int]


@dataclass(frozen=True)
class _Scene:
    """What a video shows, drawn by chance.

    Attributes:
        rate: Pictures a second.
        duration: Seconds.
        actions: (start, end, index of the class), seconds.
        random: Where the pictures' chance comes from.
    """

    rate: int
    duration: float
    actions: tuple[tuple[float, float, int], ...]
    random: np.random.Generator

    @classmethod
    def of(cls, seed: tuple[int, int]) -> _Scene:
        random = np.random.default_rng(seed)
        rate = int(random.choice(RATES))
        frames = int(random.uniform(*LENGTHS) * rate)
        duration = frames / rate
        actions: list[tuple[float, float, int]] = []
        while len(actions) < 2:  # the fewest a video has
            actions = []
            end = random.uniform(0, 2)
            for _ in range(int(random.integers(3, 6))):
                start, length = end + random.uniform(_GAP, 4.0), random.uniform(*_ACTION)
                if start + length > duration - 0.5:
                    break
                end = start + length
                actions.append((round(start, 2), round(end, 2), int(random.integers(len(CLASSES)))))
        return cls(rate, duration, tuple(actions), random)

    def annotation(self, subset: str) -> dict[str, Any]:
        """Its entry in the annotation file, as ActivityNet has it."""
        return {
            "subset": subset,
            "duration": self.duration,
            "resolution": f"{SIDE}x{SIDE}",
            "annotations": [{"label": CLASSES[k], "segment": [start, end]} for start, end, k in self.actions],
        }

    def pictures(self) -> Iterator[NDArray[np.uint8]]:
        """(SIDE, SIDE, 3) pictures."""
        random, times = self.random, np.arange(round(self.duration * self.rate)) / self.rate
        background, drift = _texture(random), random.uniform(-2, 2, 2)
        grain = np.round(random.normal(0, 4, (8, SIDE, SIDE, 3))).astype(np.int16)
        colours = _colour(random), _colour(random)
        kind, radius = int(random.integers(2)), random.uniform(15, 20)
        path = _wander(random, times, radius + 8)
        disc = _wander(random, times, 8, speed=3.0)
        angles = np.cumsum(random.normal(0, 0.02, len(times))) + random.uniform(0, 2 * np.pi)
        moves, turns, inverted = self._acts(times)
        for i, now in enumerate(times):
            picture = np.roll(background, tuple(np.round(drift * now).astype(int)), axis=(0, 1))
            picture[_inside(2, disc[i], 6.0, 0.0)] = colours[1]
            mask = _inside(kind, path[i] + moves[i], radius, angles[i] + turns[i])
            picture[mask] = 255 - colours[0] if inverted[i] else colours[0]
            picture += np.roll(grain[i % len(grain)], int(random.integers(SIDE)), axis=0)
            yield np.clip(picture, 0, 255).astype(np.uint8)

    def _acts(self, times: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """What the actions add: (pictures, 2) to the place, (pictures,) to the angle, and when colours are inverted."""
        moves, turns = np.zeros((len(times), 2)), np.zeros(len(times))
        inverted = np.zeros(len(times), dtype=bool)
        for start, end, k in self.actions:
            inside = (times >= start) & (times < end)
            since, phase = times[inside] - start, self.random.uniform(0, 2 * np.pi)
            if CLASSES[k] == "bounce":
                moves[inside, 0] -= 16 * np.abs(np.sin(np.pi * _BOUNCES * since + phase))
            elif CLASSES[k] == "flash":
                inverted[inside] = (since * 2 * _FLASHES + phase).astype(int) % 2 == 0
            else:
                turns[inside] += 2 * np.pi * _TURNS * since
        return moves, turns, inverted


def make(video: Video, folder: Path) -> dict[str, Any]:
    """Write one video, unless it is there, and return its annotation."""
    scene, path = _Scene.of(video.seed), folder / f"{video.id}.mp4"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.part")
        _write(scene, partial)
        partial.replace(path)
    return scene.annotation(video.subset)


def videos(training: int, held_out: int, seed: int) -> list[Video]:
    """What there is to make; the held-out ones do not depend on how many others there are."""
    counts = dict(zip(SUBSETS, (training, held_out), strict=True))
    return [
        Video(f"{subset}_{seed}_{i:04d}", subset, (seed, 2 * i + part))
        for part, subset in enumerate(SUBSETS)
        for i in range(counts[subset])
    ]


def _write(scene: _Scene, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.rate)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        # without its tree of macroblocks x264 makes the same file every time; with it, one in a few differs
        deterministic = {"x264-params": "mbtree=0"}
        stream.options = {"crf": "23", "preset": "veryfast", "g": str(4 * scene.rate), **deterministic}
        stream.codec_context.thread_count = 1
        for picture in scene.pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _texture(random: np.random.Generator) -> NDArray[np.int16]:
    """A cluttered picture that repeats seamlessly: noise of three sizes, in colour."""
    total = np.zeros((SIDE, SIDE, 3))
    for cells in (4, 12, 24):
        coarse = random.random((cells, cells, 3))
        total += np.kron(coarse, np.ones((SIDE // cells, SIDE // cells, 1)))
    return np.round(88 + 80 * total / 3).astype(np.int16)


def _colour(random: np.random.Generator) -> NDArray[np.int16]:
    """A colour that stands out from the background; inverted it is as likely, so no picture shows that it is."""
    return np.where(random.random(3) < 0.5, random.integers(0, 70, 3), random.integers(186, 256, 3)).astype(
        np.int16
    )


def _wander(random: np.random.Generator, times: Floats, margin: float, speed: float = 1.0) -> Floats:
    """(pictures, 2) A smooth path that keeps `margin` away from the edges."""
    span = SIDE - 2 * margin
    waves = random.uniform(0.02, 0.06, (2, 2)) * speed
    phases = random.uniform(0, 2 * np.pi, (2, 2))
    paths = np.sin(2 * np.pi * waves[:, :, None] * times + phases[:, :, None]).mean(axis=1)
    path: Floats = margin + span * (0.5 + 0.5 * paths.T)
    return path


_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float64)


def _inside(kind: int, centre: Floats, radius: float, angle: float) -> NDArray[np.bool_]:
    """Which points a shape covers: 0 a bar, 1 a cross, 2 a disc."""
    y, x = _ROWS - centre[0], _COLUMNS - centre[1]
    if kind == 2:
        return np.asarray(y**2 + x**2 < radius**2)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    bar = (np.abs(u) < radius) & (np.abs(v) < 0.4 * radius)
    if kind == 0:
        return np.asarray(bar)
    return np.asarray(bar | ((np.abs(v) < radius) & (np.abs(u) < 0.3 * radius)))
