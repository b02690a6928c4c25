"""An evaluation as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from examples.re2tal.evaluation.metrics import Evaluation


def table_of(evaluation: Evaluation, *, by_class: bool = False) -> Table:
    """MAP at each threshold, and the average precision of each class."""
    table = Table(title=f"average precision by tIoU, {len(evaluation.classes)} classes", title_justify="left")
    table.add_column("class")
    for threshold in evaluation.tiou:
        table.add_column(f"{threshold:.2f}", justify="right")
    table.add_column("average", justify="right", style="bold")
    for i, name in enumerate(evaluation.classes if by_class else ()):
        table.add_row(name, *_cells(evaluation.ap[:, i]), end_section=i + 1 == len(evaluation.classes))
    table.add_row("mAP", *_cells(evaluation.mAP))
    return table


def _cells(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.4f}" for value in (*values, values.mean())]
