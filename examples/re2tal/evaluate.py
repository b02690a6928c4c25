"""Evaluate a file of predictions as ActivityNet's official code does.

python -m examples.re2tal.evaluate GROUND_TRUTH.json PREDICTIONS.json --subset validation --tiou 0.5:0.05:0.95
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated

import typer

from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.evaluation.metrics import evaluate, recall_at
from examples.re2tal.evaluation.postprocess import read_submission
from examples.re2tal.report.table import table_of
from examples.re2tal.sections import thresholds


def main(
    ground_truth: Annotated[Path, typer.Argument(help="The annotation file, in any dialect.")],
    predictions: Annotated[Path, typer.Argument(help="Detections, as ActivityNet's server takes them.")],
    subset: Annotated[str, typer.Option(help="Which videos count.")] = "validation",
    tiou: Annotated[str, typer.Option(help="first:step:last, or a list with commas.")] = "0.5:0.05:0.95",
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    blocked: Annotated[Path | None, typer.Option(help="JSON list of ids to leave out.")] = None,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates", help="Count actions that are annotated twice once, as OpenTAD does."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Evaluate a file of predictions as ActivityNet's official code does.

    Example: python -m examples.re2tal.evaluate thumos_14_anno.json predictions.json --tiou 0.3:0.1:0.7
    """
    with ended_by_errors(ValueError):
        truth = read_annotations(ground_truth, classes=classes, blocked=blocked)
        results, unknown = read_submission(predictions, truth.classes)
        values = thresholds(tiou)
        found = evaluate(truth, results, subset=subset, tiou=values, drop_duplicates=drop_duplicates)
        recall = recall_at(truth, results, subset=subset, tiou=values, drop_duplicates=drop_duplicates)
    strangers = len(results.keys() - truth.blocked - {video.id for video in truth.subset(subset)})
    if as_json:
        print(
            json.dumps(
                {
                    "tiou": found.tiou.tolist(),
                    "mAP": found.mAP.tolist(),
                    "average_mAP": found.average_mAP,
                    "recall_at_1x": recall[0].tolist(),
                    "recall_at_5x": recall[1].tolist(),
                    "ap": {name: found.ap[:, i].tolist() for i, name in enumerate(found.classes)},
                    "unknown_labels": unknown,
                    "unknown_videos": strangers,
                }
            )
        )
        return
    console = terminal()
    console.print(table_of(found, by_class=True))
    if unknown:
        console.print(f"left out: {unknown} predictions of labels that the annotations do not have")
    if strangers:
        console.print(f"counted as false: predictions of {strangers} videos that {subset!r} does not have")


if __name__ == "__main__":
    typer.run(main)
