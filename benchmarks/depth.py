"""Bytes and seconds of one training step against the number of blocks: plain, checkpointed and rewired.

    python -m benchmarks.depth --help

The same small vision transformer at several depths. What a strategy keeps for backward grows by so many bytes with
each block: the slope of the least-squares line through its measured depths, for held and for peak bytes. The rewired
model keeps the two streams at the end of its chain whatever the depth, and of each branch a few numbers that its
second run is compared with, so its slope is next to nothing; that of torch's checkpoint is one tensor a block, that of
a plain step everything autograd saves in one. What is counted, and how, is written into the result file
(`step_report.METHOD`).
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.shared import result_files, terminal
from benchmarks.shared.step_measurement import Case, Row, run, steps_to_come
from benchmarks.shared.step_report import METHOD, document, table
from benchmarks.shared.strategies import STRATEGIES, chosen
from benchmarks.shared.timm_cases import Amp, timm_case
from revwire.errors import RevwireError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEPTHS = (12, 24, 48, 96)
DRAWN = ("plain", "checkpoint", "rewired", "lean")
_MIB = 2**20


def depth_case(blocks: int, spec: str, **settings: Any) -> Case:
    """`spec` with so many blocks.

    Args:
        blocks: timm's `depth` of the model.
        spec: timm's name of a model that takes a depth, and `@` and a batch size if it is to have its own.
        settings: Further arguments of `timm_cases.timm_case`.

    Raises:
        RevwireError: timm has no such model, or it takes no depth.
    """
    case = timm_case(spec, model_args={"depth": blocks}, **settings)
    return dataclasses.replace(
        case, name=f"{case.name}, {blocks} blocks", about={**case.about, "blocks": blocks}
    )


def slopes(rows: Sequence[Row], blocks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that one more block costs: strategy, to the least-squares slopes of `"held"` and `"peak"`.

    Args:
        rows: What `run` returned.
        blocks: How many blocks each case has, by its name.

    Returns:
        Only the strategies that were measured at two depths or more.
    """
    found = {}
    for strategy, points in _lines(rows, blocks).items():
        measured = [(depth, row.memory) for depth, row in points if row.memory]
        if len(measured) < 2:
            continue
        depths = [depth for depth, _ in measured]
        found[strategy] = {
            figure: statistics.linear_regression(
                depths, [getattr(memory, figure) for _, memory in measured]
            ).slope
            for figure in ("held", "peak")
        }
    return found


def _lines(rows: Sequence[Row], blocks: Mapping[str, int]) -> dict[str, list[tuple[int, Row]]]:
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in sorted(rows, key=lambda row: blocks[row.case]):
        lines.setdefault(row.strategy, []).append((blocks[row.case], row))
    return lines


def slope_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """The slopes to print, in whole bytes."""
    result = Table(title="bytes per block", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    result.add_column("strategy", no_wrap=True)
    for figure in ("held", "peak"):
        result.add_column(figure, justify="right", no_wrap=True)
    for strategy, slope in found.items():
        result.add_row(escape(strategy), f"{slope['held']:,.0f}", f"{slope['peak']:,.0f}")
    return result


def plot(rows: Sequence[Row], blocks: Mapping[str, int], caption: str, path: Path) -> None:
    """Draw bytes (held solid, peak dashed) and seconds over depth, a colour for each strategy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    space, time = figure.subplots(1, 2)
    per_block = slopes(rows, blocks)
    for at, (strategy, points) in enumerate(_lines(rows, blocks).items()):
        measured = [(depth, row.memory) for depth, row in points if row.memory]
        timed = [(depth, row.timing.median) for depth, row in points if row.timing]
        for name, style in (("held", "o-"), ("peak", "o--")):
            label = f"{strategy}, {name}"
            if strategy in per_block:
                kib = per_block[strategy][name] / 2**10
                label += f": {kib:,.{0 if kib >= 10 else 1}f} KiB a block"
            heights = [getattr(memory, name) / _MIB for _, memory in measured]
            space.plot([depth for depth, _ in measured], heights, style, color=f"C{at}", label=label)
        time.plot([depth for depth, _ in timed], [s for _, s in timed], "o-", color=f"C{at}", label=strategy)
    space.set(title="memory of a training step", ylabel="MiB")
    time.set(title="time of a training step", ylabel="seconds, median")
    for panel in (space, time):
        panel.set_xlabel("blocks")
        panel.set_xticks(sorted(set(blocks.values())))
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150)


def main(
    depth: Annotated[
        list[int] | None,
        typer.Option(
            "--depth", "-d", min=1, help=f"Blocks; repeat; {', '.join(map(str, DEPTHS))} if not given."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="timm model that takes a depth.")
    ] = "vit_tiny_patch16_224",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in a step.")] = 2,
    size: Annotated[int | None, typer.Option(help="Image side; the model's own if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    amp: Annotated[Amp, typer.Option(help="Autocast of the forward.")] = Amp.none,
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of each strategy; 0: no clock.")] = 5,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            "-s",
            help=f"One of {', '.join(STRATEGIES)}; repeat; {', '.join(DRAWN)} if not given.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, images and labels.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the JSON and PNG files.", show_default="benchmarks/results")
    ] = result_files.RESULTS,
    name: Annotated[str | None, typer.Option(help="Their name; depth-DEVICE-AMP if not given.")] = None,
) -> None:
    """Measure a training step at several depths, print what a block costs and write it down.

    Quick look: python -m benchmarks.depth -d 4 -d 8 --size 64 --rounds 1 --out /tmp/depth

    On a GPU: python -m benchmarks.depth --device cuda --amp bf16 -m vit_small_patch16_224@64
    """
    console = terminal.console()
    depths = sorted(set(depth or DEPTHS))
    if len(depths) < 2:
        raise typer.BadParameter("a slope needs two different depths", param_hint="--depth")
    try:
        cases = [depth_case(d, model, batch=batch, size=size, device=device, seed=seed) for d in depths]
    except RevwireError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    ways = chosen(strategy or DRAWN, amp.dtype)
    with terminal.progress_bar(steps_to_come(len(cases), len(ways), rounds)) as progress:
        rows = run(cases, ways, rounds=rounds, autocast=amp.dtype, progress=progress)
    blocks = {case.name: case.about["blocks"] for case in cases}
    settings = {"device": device, "amp": amp.value, "rounds": rounds, "seed": seed}
    written = document(cases, rows, "benchmarks.depth", settings)
    written["bytes_per_block"] = slopes(rows, blocks)
    caption = result_files.caption(written)
    console.print(table(rows), slope_table(written["bytes_per_block"]), caption, METHOD, sep="\n")
    stem = out / (name or f"depth-{torch.device(device).type}-{amp.value}")
    text, picture = result_files.write(written, stem.with_suffix(".json")), stem.with_suffix(".png")
    plot(rows, blocks, caption, picture)
    console.print("written:", text, picture)


if __name__ == "__main__":
    typer.run(main)
