"""What `step_measurement.run` measured, as a table to print, a JSON document and a picture."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from benchmarks.shared import result_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.shared.step_measurement import Case, Row

BASELINES = {"plain": "/plain", "checkpoint": "/ckpt"}  # strategy: heading of the ratios to it
FIGURES = ("held", "peak", "seconds")
_TITLES = {"held": "held between forward and backward", "peak": "peak", "seconds": "time"}
METHOD = (
    "One training step is forward, loss and backward; no optimizer step. Held: bytes alive between "
    "forward and backward with only the loss kept. Peak: most bytes alive at once during the step. "
    "Neither counts parameters, buffers, inputs, targets, or the parameters' .grad, which exist before "
    "the step; a parameter's gradient on its way into .grad counts. One unmeasured step comes first. "
    "'live tensors': storages of the tensors that operators return, each once, until nothing refers to "
    "them; scratch memory inside a kernel and saved random states are not seen. 'CUDA allocator': "
    "torch.cuda.memory_allocated and max_memory_allocated, less what was allocated before. Seconds: "
    "median over rounds in which the strategies take turns, after one warm-up, without the meter; ratios "
    "of seconds are medians of the ratios of each round. Every strategy has its own copy of the same "
    "initial model. The pool that a CUDA graph keeps for itself is not counted: such ways have seconds only."
)
_MIB = 2**20


def ratio(row: Row, base: Row, figure: str) -> float | None:
    """How much of `base`'s `"held"`, `"peak"` or `"seconds"` a row needs; None where either has none."""
    if figure == "seconds":
        return row.timing.ratio(base.timing) if row.timing and base.timing else None
    if row.memory is None or base.memory is None:
        return None
    below = getattr(base.memory, figure)
    return getattr(row.memory, figure) / below if below else None


def baselines(rows: Sequence[Row], case: str) -> dict[str, Row]:
    """The rows of `case` that the others are compared with, by strategy, in the order of `BASELINES`."""
    found = {row.strategy: row for row in rows if row.case == case and not row.failure}
    return {name: found[name] for name in BASELINES if name in found}


def compared(row: Row, bases: dict[str, Row]) -> dict[str, Row]:
    """Those of the baselines a row is compared with: all, or for a baseline those before it."""
    if row.strategy not in bases:
        return bases
    return dict(itertools.takewhile(lambda base: base[0] != row.strategy, bases.items()))


def table(rows: Sequence[Row]) -> Group:
    """The rows to print, a table for each case: figures, and what part they are of each baseline's."""
    return Group(*(_case_table(case, [row for row in rows if row.case == case]) for case in cases_of(rows)))


def cases_of(rows: Sequence[Row]) -> list[str]:
    """The cases the rows are about, in their order."""
    return list(dict.fromkeys(row.case for row in rows))


def _case_table(case: str, rows: Sequence[Row]) -> Table:
    bases = baselines(rows, case)
    result = Table(title=escape(case), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    result.add_column("strategy", no_wrap=True)
    for heading in ("held MiB", "peak MiB", "seconds"):
        result.add_column(heading, justify="right", no_wrap=True)
        for name in bases:
            result.add_column(BASELINES[name], justify="right", no_wrap=True, style="dim")
    for row in rows:
        result.add_row(escape(row.strategy), *([] if row.failure else _cells(row, bases)))
    if failures := [f"{row.strategy}: {row.failure}" for row in rows if row.failure]:
        result.caption = escape("\n".join(failures))
        result.caption_justify = "left"
    return result


def _cells(row: Row, bases: dict[str, Row]) -> list[str]:
    cells = []
    for figure in FIGURES:
        if figure == "seconds":
            cells.append(f"{row.timing.median:.3f}" if row.timing else "-")
        else:
            cells.append(f"{getattr(row.memory, figure) / _MIB:.1f}" if row.memory else "-")
        for name, base in bases.items():
            found = ratio(row, base, figure) if name in compared(row, bases) else None
            cells.append("" if found is None else f"{found:.3f}")
    return cells


def document(
    cases: Sequence[Case], rows: Sequence[Row], module: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """All there is to know about a run, JSON-ready: origin, method, settings, cases and figures.

    Args:
        cases: What was measured.
        rows: What `run` returned for them.
        module: The module run with `python -m`.
        settings: Options of the run.
    """
    return {
        **result_files.origin(module),
        "method": METHOD,
        "settings": settings,
        "cases": [{"case": case.name, **case.about} for case in cases],
        "rows": [_entry(row, baselines(rows, row.case)) for row in rows],
    }


def _entry(row: Row, bases: dict[str, Row]) -> dict[str, Any]:
    entry: dict[str, Any] = {"case": row.case, "strategy": row.strategy}
    if row.failure:
        return {**entry, "failure": row.failure}
    if row.memory:
        entry |= {"held_bytes": row.memory.held, "peak_bytes": row.memory.peak, "counted": row.memory.method}
    if row.timing:
        entry |= {"median_seconds": row.timing.median, "seconds": list(row.timing.seconds)}
    for name, base in compared(row, bases).items():
        entry[f"ratio_to_{name}"] = {figure: ratio(row, base, figure) for figure in FIGURES}
    return entry


def save(document: dict[str, Any], rows: Sequence[Row], stem: Path) -> tuple[Path, Path]:
    """Write `stem.json` and `stem.png`; returns both paths."""
    text, picture = result_files.write(document, stem.with_suffix(".json")), stem.with_suffix(".png")
    plot(rows, result_files.caption(document), picture)
    return text, picture


def plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Draw held, peak and seconds as parts of the plain step's, with the figures themselves on the bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = cases_of(rows)
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    figure = Figure(figsize=(12, 2.2 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    thickness = 0.8 / len(strategies)
    for panel, name in zip(panels, FIGURES, strict=True):
        for at, strategy in enumerate(strategies):
            places = [at * thickness + case for case in range(len(cases))]
            mine = [next((r for r in rows if (r.case, r.strategy) == (c, strategy)), None) for c in cases]
            parts = [_part_of_plain(row, rows, name) for row in mine]
            bars = panel.barh(places, [part or 0 for part in parts], thickness * 0.9, label=strategy)
            panel.bar_label(bars, [_amount(row, name) for row in mine], padding=3, fontsize=7)
        panel.set_title(_TITLES[name])
        panel.set_xlabel("part of the plain step's")
        panel.margins(x=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([case + 0.4 - thickness / 2 for case in range(len(cases))], cases)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(strategies))
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150)


def _part_of_plain(row: Row | None, rows: Sequence[Row], figure: str) -> float | None:
    base = baselines(rows, row.case).get("plain") if row else None
    return ratio(row, base, figure) if row and base else None


def _amount(row: Row | None, figure: str) -> str:
    if row is None or row.failure:
        return row.failure[:40] if row else ""
    if figure == "seconds":
        return f"{row.timing.median:.3g} s" if row.timing else ""
    return f"{getattr(row.memory, figure) / _MIB:,.1f} MiB" if row.memory else ""
