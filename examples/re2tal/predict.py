"""What happens in one video file, as a trained run sees it.

python -m examples.re2tal.predict runs/synthetic data/synthetic/videos/validation_0_0000.mp4 --png actions.png
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from examples.re2tal.config import Config, read_config
from examples.re2tal.data.annotations import AnnotatedVideo, Annotations
from examples.re2tal.data.dataset import Clips
from examples.re2tal.data.video import open_video
from examples.re2tal.distributed.world import joined
from examples.re2tal.errors import Re2TALError
from examples.re2tal.evaluation.inference import detect
from examples.re2tal.training import checkpoints
from examples.re2tal.training.setup import annotations_of, detector_of
from revwire.errors import RevwireError

if TYPE_CHECKING:
    from examples.re2tal.detector import Detector
    from examples.re2tal.evaluation.postprocess import Detections


def detections_in(run: Path, video: Path, device: str = "auto") -> tuple[Detections, tuple[str, ...], float]:
    """What a run detects in a video: the detections, the names of the classes, and the video's length in seconds.

    Raises:
        Re2TALError: the folder holds no run, or the video cannot be read.
    """
    config, classes, detector = trained(run)
    with open_video(video, decoder=config.data.decoder) as reader:
        duration = reader.duration
    one = Annotations({video.stem: AnnotatedVideo(video.stem, "one", duration, None, None, ())}, classes)
    clip = config.clip
    clips = Clips(
        one,
        "one",
        video.parent,
        sampling=clip.sampling,
        frames=clip.frames,
        positions=clip.positions,
        size=clip.size,
        rate=clip.rate,
        overlap=clip.overlap,
        decoder=config.data.decoder,
    )
    with joined(device) as world:
        found, skipped = detect(detector.to(world.device), clips, config, classes, world)
    if video.stem not in found:
        raise Re2TALError(f"{video}: {skipped.get(str(video), 'nothing could be read')}")
    return found[video.stem], classes, duration


def trained(run: Path) -> tuple[Config, tuple[str, ...], Detector]:
    """The settings, classes and model of a run, with its averaged weights.

    Raises:
        Re2TALError: the folder holds none.
    """
    weights, config = checkpoints.trained_weights(run), read_config(run / "config.yaml")
    classes = annotations_of(config).classes
    detector = detector_of(config, len(classes), weights=False)
    detector.load_state_dict(weights)
    return config, classes, detector


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


def main(
    run: Annotated[Path, typer.Argument(help="Output folder of a training.")],
    video: Annotated[Path, typer.Argument(help="A video file.")],
    threshold: Annotated[float, typer.Option(help="Least score to print.")] = 0.3,
    png: Annotated[Path | None, typer.Option(help="Draw a timeline.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Print what happens in one video file, and draw it.

    Example: python -m examples.re2tal.predict runs/synthetic VIDEO.mp4 --threshold 0.5 --png actions.png
    """
    try:
        found, classes, duration = detections_in(run, video, device)
    except (Re2TALError, RevwireError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    sure = found.surest(threshold)
    if png is not None:
        draw(png, sure, classes, duration)
    rows = [
        {"label": classes[label], "segment": segment.tolist(), "score": float(score)}
        for segment, score, label in zip(sure.segments, sure.scores, sure.labels, strict=True)
    ]
    if as_json:
        print(json.dumps({"video": str(video), "duration": duration, "actions": rows}))
        return
    table = Table(title=f"{video.name}, {duration:.1f} s", title_justify="left")
    for heading in ("start", "end", "score"):
        table.add_column(heading, justify="right")
    table.add_column("action")
    for row in sorted(rows, key=lambda row: row["segment"]):
        start, end = row["segment"]
        table.add_row(f"{start:.1f}", f"{end:.1f}", f"{row['score']:.2f}", row["label"])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
