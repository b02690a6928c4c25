"""Train a detector end to end, evaluate it, and draw a report.

    python -m examples.re2tal.train synthetic
    python -m examples.re2tal.train swin_t_thumos14 memory='{strategy: checkpoint}' output=runs/checkpointed
    torchrun --nproc-per-node 4 -m examples.re2tal.train videomae_l_thumos14 parallel=fsdp2

A run that was stopped goes on where it was: give the same command again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from examples.re2tal.config import Config, read_config
from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.distributed.world import joined
from examples.re2tal.evaluation.postprocess import write_submission
from examples.re2tal.report.page import write_report
from examples.re2tal.report.table import table_of
from examples.re2tal.training.logs import Log, history
from examples.re2tal.training.trainer import Outcome, Trainer
from revwire.checkpoint.disk import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from examples.re2tal.data.annotations import Annotations


def run(config: Config, device: str = "auto") -> Outcome:
    """Train, evaluate, and write `predictions.json`, `results.json` and `report.html` into the output folder."""
    with joined(device) as world:
        trainer = Trainer(config, world)
        with Log(config.output, enabled=world.is_first, step=trainer.step, total=trainer.total) as log:
            if trainer.step:
                log.say(f"going on from step {trainer.step} of {trainer.total}")
            trainer.fit(log)
            outcome = trainer.outcome(log)
        if world.is_first:
            write_outcome(config, trainer.annotations, outcome, trainer.skipped)
        world.wait()
    return outcome


def write_outcome(
    config: Config, annotations: Annotations, outcome: Outcome, skipped: Mapping[str, str] | None = None
) -> None:
    """Write `predictions.json`, `results.json` and `report.html` into the output folder.

    Args:
        config: The experiment.
        annotations: Of its data set.
        outcome: What was found.
        skipped: Reasons, by the path of files that could not be read while training.
    """
    classes = annotations.classes
    write_submission(config.output / "predictions.json", outcome.results, classes)
    evaluation = outcome.evaluation
    figures = {
        "tiou": evaluation.tiou.tolist(),
        "mAP": evaluation.mAP.tolist(),
        "average_mAP": evaluation.average_mAP,
        "ap": {name: evaluation.ap[:, i].tolist() for i, name in enumerate(evaluation.classes)},
        "skipped": {**(skipped or {}), **outcome.skipped},
    }
    write_report(
        config.output / "report.html",
        annotations,
        outcome.results,
        subset=config.data.evaluate,
        tiou=evaluation.tiou,
        videos=config.data.videos,
        history=history(config.output / "log.jsonl"),
        title=str(config.output),
    )
    write_text(config.output / "results.json", json.dumps(figures, indent=1))


def tell(config: Config, outcome: Outcome) -> None:
    """Print how good a model is, and where the report lies."""
    console = terminal()
    console.print(table_of(outcome.evaluation))
    console.print(f"report: {config.output / 'report.html'}")


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.of.the.setting=value ...")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a detector end to end, evaluate it, and draw a report.

    Example: python -m examples.re2tal.train synthetic memory.strategy=plain output=runs/plain
    """
    with ended_by_errors():
        settings = read_config(config, overrides or [])
        outcome = run(settings, device)
    tell(settings, outcome)


if __name__ == "__main__":
    typer.run(main)
