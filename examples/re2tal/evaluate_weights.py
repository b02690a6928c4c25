"""Run a trained detector that somebody published on the videos of an experiment, and evaluate what it finds.

    python -m examples.re2tal.evaluate_weights thumos_re2tal_swin_tiny.pth swin_t_thumos14 data.videos=videos

A row of the paper is this one command, for whoever has its weights and the videos. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.re2tal.config import Config, read_config
from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.distributed.world import joined
from examples.re2tal.train import tell, write_outcome
from examples.re2tal.training.setup import annotations_of, clips_of, detector_of, resolved
from examples.re2tal.training.trainer import Outcome, outcome_of


def run(config: Config, device: str = "auto") -> Outcome:
    """Detect and evaluate; `predictions.json`, `results.json` and `report.html` go into the output folder.

    Raises:
        Re2TALError: the weights do not fit the configuration, or a video is missing.
    """
    config = resolved(config)
    with joined(device) as world:
        annotations = annotations_of(config)
        clips = clips_of(config, annotations, training=False)
        detector = detector_of(config, len(annotations.classes)).to(world.device).eval()
        columns = TextColumn("detecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=terminal(stderr=True), disable=not world.is_first) as bar:
            task = bar.add_task("")
            outcome = outcome_of(
                detector,
                clips,
                config,
                annotations,
                world,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        if world.is_first:
            config.output.mkdir(parents=True, exist_ok=True)
            write_outcome(config, annotations, outcome)
        world.wait()
    return outcome


def main(
    weights: Annotated[Path, typer.Argument(help="A trained detector: OpenTAD's, or one of this example's.")],
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.of.the.setting=value ...")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Run a trained detector on the videos of an experiment, and evaluate what it finds.

    Example: python -m examples.re2tal.evaluate_weights WEIGHTS.pth swin_t_thumos14 data.videos=videos
    """
    own = [f"detector.weights={weights}", f"output=runs/{weights.name.partition('.')[0]}"]
    with ended_by_errors():
        settings = read_config(config, [*own, *(overrides or [])])
        outcome = run(settings, device)
    tell(settings, outcome)


if __name__ == "__main__":
    typer.run(main)
