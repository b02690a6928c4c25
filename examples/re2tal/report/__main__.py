"""Draw a file of predictions as one HTML page.

python -m examples.re2tal.report GROUND_TRUTH.json PREDICTIONS.json report.html --videos data/synthetic/videos
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import Annotated

import typer

from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.evaluation.postprocess import read_submission
from examples.re2tal.report.page import write_report
from examples.re2tal.sections import thresholds


def main(
    ground_truth: Annotated[Path, typer.Argument(help="The annotation file.")],
    predictions: Annotated[Path, typer.Argument(help="Detections, as ActivityNet's server takes them.")],
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    videos: Annotated[Path | None, typer.Option(help="Folder of the video files, for pictures.")] = None,
    subset: Annotated[str, typer.Option(help="Which videos count.")] = "validation",
    tiou: Annotated[str, typer.Option(help="first:step:last, or a list with commas.")] = "0.3:0.1:0.7",
) -> None:
    """Draw an evaluation as one HTML page.

    Example: python -m examples.re2tal.report truth.json predictions.json report.html --videos videos
    """
    with ended_by_errors(ValueError):
        truth = read_annotations(ground_truth)
        results, _ = read_submission(predictions, truth.classes)
        found = write_report(
            out, truth, results, subset=subset, tiou=thresholds(tiou), videos=videos, title=predictions.name
        )
    terminal().print(f"{out}: average mAP {found.average_mAP:.4f}")


if __name__ == "__main__":
    typer.run(main)
