"""Make the synthetic data set: videos, and the annotation file that goes with them.

python -m examples.re2tal.synth data/synthetic
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated, Any

import typer
from rich.progress import track

from examples.re2tal.console import terminal
from examples.re2tal.data.synth import CLASSES, make, videos
from revwire.checkpoint.disk import write_text


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    training: Annotated[int, typer.Option("--videos", min=1, help="Videos to train on.")] = 320,
    held_out: Annotated[int, typer.Option(min=1, help="Videos to evaluate on.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="How many to draw at a time.")] = os.cpu_count() or 1,
) -> None:
    """Make the synthetic data set: OUT/videos/*.mp4 and OUT/annotations.json. Files that are there are kept.

    Example: python -m examples.re2tal.synth data/small --videos 40 --held-out 10
    """
    console, wanted = terminal(), videos(training, held_out, seed)
    folder = out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes) as pool:
        jobs = {pool.submit(make, video, folder): video.id for video in wanted}
        for job in track(as_completed(jobs), "drawing videos", total=len(jobs), console=console):
            made[jobs[job]] = job.result()
    database = {video.id: made[video.id] for video in wanted}
    text = json.dumps({"version": f"synthetic, seed {seed}", "database": database}, indent=1)
    write_text(out / "annotations.json", text)
    actions = sum(len(entry["annotations"]) for entry in database.values())
    console.print(f"{len(database)} videos with {actions} actions of {len(CLASSES)} classes in {out}")


if __name__ == "__main__":
    typer.run(main)
