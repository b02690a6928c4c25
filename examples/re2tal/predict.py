"""What happens in one video file, as a trained run sees it.

python -m examples.re2tal.predict runs/synthetic data/synthetic/videos/validation_0_0000.mp4 --png actions.png
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated

import typer
from rich.table import Table

from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.distributed.world import joined
from examples.re2tal.evaluation.inference import detect_in_file
from examples.re2tal.report.timeline import draw
from examples.re2tal.training.setup import trained


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
    with ended_by_errors():
        config, classes, detector = trained(run)
        with joined(device) as world:
            found, duration = detect_in_file(video, detector.to(world.device), config, classes, world)
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
    terminal().print(table)


if __name__ == "__main__":
    typer.run(main)
