"""Bytes and seconds of one training step: plain, with activation checkpointing, and rewired.

    python -m benchmarks.memory --help

Held is what lives between forward and backward, peak the most that lives at once during both. The clock and
the meter are separate runs, because the meter slows the step it watches. Where the figures come from, and
what they do not count, is written into every result file (`step_report.METHOD`).

For a model of your own:

    from rich import print
    from benchmarks.shared.step_measurement import Case, run
    from benchmarks.shared.step_report import table

    print(table(run([Case("mine", factory, inputs)])))
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.shared import result_files, terminal
from benchmarks.shared.step_measurement import Case, Row, run, steps_to_come
from benchmarks.shared.step_report import METHOD, document, save, table
from benchmarks.shared.strategies import STRATEGIES, chosen, worth_measuring
from benchmarks.shared.timm_cases import Amp, timm_case
from revwire.errors import RevwireError
from revwire.measure.estimate import estimate
from revwire.measure.strategies import STRATEGIES as ESTIMATED

MODELS = (
    "vit_tiny_patch16_224@4",
    "vit_small_patch16_224@8",
    "vit_base_patch16_224@8",
    "swin_tiny_patch4_window7_224@4",
    "convnext_tiny@4",
    "resnet50@4",
)


def against_estimates(case: Case, rows: list[Row], autocast: torch.dtype | None) -> list[dict[str, Any]]:
    """The peak of each way that was measured beside what `revwire.estimate` says of it."""
    measured = {row.strategy: row.memory for row in rows if row.case == case.name and row.memory}
    names = [name for name in measured if name in ESTIMATED]
    found = estimate(
        case.factory(),
        case.inputs,
        strategies=names,
        optimizer=None,
        loss_fn=case.loss_fn,
        autocast=autocast,
    )
    return [
        {
            "case": case.name,
            "strategy": row.strategy,
            "peak_bytes": measured[row.strategy].peak,
            "estimated_bytes": row.activations,
            "ratio": row.activations / measured[row.strategy].peak,
        }
        for row in found.rows
    ]


def table_of_estimates(found: list[dict[str, Any]]) -> Table:
    """Measured and estimated peaks to print."""
    shown = Table(title="peak, measured and estimated", title_justify="left")
    for heading in ("model", "strategy"):
        shown.add_column(heading)
    for heading in ("measured MiB", "estimated MiB", "ratio"):
        shown.add_column(heading, justify="right")
    for row in found:
        sizes = (f"{row[key] / 2**20:.1f}" for key in ("peak_bytes", "estimated_bytes"))
        shown.add_row(row["case"], row["strategy"], *sizes, f"{row['ratio']:.3f}")
    return shown


def main(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="timm model, NAME or NAME@BATCH; repeat for several."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in a step.")] = 4,
    size: Annotated[int | None, typer.Option(help="Image side; the model's own if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    amp: Annotated[Amp, typer.Option(help="Autocast of the forward.")] = Amp.none,
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of each strategy; 0: no clock.")] = 5,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", "-s", help=f"One of {', '.join(STRATEGIES)}; repeat; all if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, images and labels.")] = 0,
    estimated: Annotated[
        bool, typer.Option("--estimate", help="Estimate the peaks too, and compare with what was measured.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the JSON and PNG files.", show_default="benchmarks/results")
    ] = result_files.RESULTS,
    name: Annotated[str | None, typer.Option(help="Their name; memory-DEVICE-AMP if not given.")] = None,
) -> None:
    """Measure bytes and seconds of one training step, print them and write them down.

    Quick look: python -m benchmarks.memory --rounds 1 --model vit_tiny_patch16_224 --batch 2

    On a GPU: python -m benchmarks.memory --device cuda --amp bf16 -m vit_large_patch16_224@64

    Only two ways: python -m benchmarks.memory -s checkpoint -s rewired -m resnet50@8
    """
    console = terminal.console()
    ways = chosen(strategy or worth_measuring(device), amp.dtype)
    try:
        cases = [timm_case(m, batch=batch, size=size, device=device, seed=seed) for m in model or MODELS]
    except RevwireError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    with terminal.progress_bar(steps_to_come(len(cases), len(ways), rounds)) as progress:
        # a way that torch refuses has a row that says so
        told = RevwireError, RuntimeError
        rows = run(cases, ways, rounds=rounds, autocast=amp.dtype, reported=told, progress=progress)
    settings = {"device": device, "amp": amp.value, "rounds": rounds, "seed": seed}
    written = document(cases, rows, "benchmarks.memory", settings)
    if estimated:
        with console.status("estimating"):
            written["estimates"] = [e for case in cases for e in against_estimates(case, rows, amp.dtype)]
        console.print(table_of_estimates(written["estimates"]))
    console.print(table(rows), result_files.caption(written), METHOD, sep="\n")
    stem = out / (name or f"memory-{torch.device(device).type}-{amp.value}")
    console.print("written:", *save(written, rows, stem))


if __name__ == "__main__":
    typer.run(main)
