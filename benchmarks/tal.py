"""Temporal action localization (TAL) with Re2TAL: rewiring a trained network, and training end to end.

    python -m examples.re2tal.synth data/synthetic
    python -m benchmarks.tal --data data/synthetic --seeds 3 --jobs 2

For every seed, on the same videos of the synthetic set and with the same head: a network is trained end to end as it
is; rewired, it is evaluated without further training, and after a few epochs of it; a rewired network is trained from
random initialisation for as few epochs, and for all of them; and the head is trained alone, on a backbone that stays
as it was initialised. Each row is the average mAP (tIoU 0.3 to 0.7) on held-out videos. A run that was stopped goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table

import revwire
from benchmarks.shared import result_files, terminal
from examples.re2tal.config import Config, read_config
from examples.re2tal.distributed.world import World
from examples.re2tal.training.logs import Log
from examples.re2tal.training.setup import backbone_of
from examples.re2tal.training.strategy import lay_out
from examples.re2tal.training.trainer import Trainer
from revwire.measure.step import mean_square, measure_step

if TYPE_CHECKING:
    from collections.abc import Mapping

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "plain"},
    "checkpoint": {"strategy": "checkpoint"},
    "rewired": {"strategy": "rewired"},
    "rewired, transitions": {"strategy": "rewired", "transitions": "checkpoint"},
}
"""Ways of the backbone's step whose memory is compared: arguments of `lay_out`."""

_TUNED = ("optim.lr=3.0e-4", "optim.backbone_lr=3.0e-4", "optim.warmup=0.5")


@dataclass(frozen=True)
class Run:
    """One row of the comparison.

    Attributes:
        name: Its folder.
        title: What the table calls it.
        overrides: Its settings, beside those that all share.
        after: The run whose weights it starts from.
        few: Whether it trains for the few epochs; None: not at all.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    after: str = ""
    few: bool | None = False


RUNS = (
    Run("plain", "end to end, plain", ("memory.strategy=plain",)),
    Run("rewired", "its weights rewired, not trained further", ("memory.strategy=rewired",), "plain", None),
    Run("tuned", "then a few epochs, rewired", ("memory.strategy=rewired", *_TUNED), "plain", few=True),
    Run("scratch-few", "rewired from random, as few epochs", ("memory.strategy=rewired",), few=True),
    Run("scratch", "rewired from random, all epochs", ("memory.strategy=rewired",)),
    Run("frozen", "backbone frozen as initialised", ("memory.strategy=frozen",)),
)


def settings(run: Run, seed: int, shared: Mapping[str, Any]) -> Config:
    """The experiment of one row and seed."""
    folder = Path(shared["runs"]) / f"seed-{seed}"
    overrides = [
        f"data.annotations={shared['data']}/annotations.json",
        f"data.videos={shared['data']}/videos",
        f"output={folder / run.name}",
        f"seed={seed}",
        f"optim.epochs={shared['few'] if run.few else shared['epochs']}",
        *run.overrides,
    ]
    if run.after:
        overrides.append(f"start_from={folder / run.after}")
    return read_config(shared["config"], [*overrides, *shared["overrides"]])


def evaluated(run: Run, seed: int, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Train and evaluate one row for one seed, or read what an earlier call found."""
    torch.set_num_threads(1)
    config = settings(run, seed, shared)
    path = config.output / "outcome.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    world, started = World(0, 1, torch.device("cpu")), time.perf_counter()
    trainer = Trainer(config, world)
    if run.few is not None:
        with Log(config.output, enabled=True, step=trainer.step, total=trainer.total, quiet=True) as log:
            trainer.fit(log)
    trained = time.perf_counter() - started
    evaluation = trainer.outcome().evaluation
    found = {
        "run": run.name,
        "seed": seed,
        "average_mAP": evaluation.average_mAP,
        "mAP": dict(zip([f"{t:.1f}" for t in evaluation.tiou], evaluation.mAP.tolist(), strict=True)),
        "steps": trainer.step,
        "seconds": round(trained, 1),
    }
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def of_seed(seed: int, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows for one seed, in their order."""
    return [evaluated(run, seed, shared) for run in RUNS]


def memory_of(config: Config, limit: str) -> list[dict[str, Any]]:
    """What the backbone's training step holds and peaks at, and the longest clip that fits, for each way."""
    shape = (config.optim.batch, 3, config.clip.frames, *config.clip.size)
    clip, rows = torch.randn(shape), []
    ways = {way: partial(_laid_out, shape, arguments) for way, arguments in WAYS.items()}
    fits = revwire.estimate(
        backbone_of(config), (clip,), strategies=ways, optimizer=None, limit=limit, vary=2
    )
    for way, laid_out in ways.items():
        backbone = laid_out(backbone_of(config))
        measure_step(backbone, clip, mean_square)
        step = measure_step(backbone, clip, mean_square)
        if fits[way].failure:
            raise RuntimeError(f"{way}: {fits[way].failure}")
        rows.append({"way": way, "held": step.held, "peak": step.peak, "longest_clip": fits[way].fits})
    return rows


def _laid_out(shape: tuple[int, ...], arguments: Mapping[str, Any], backbone: Any) -> Any:
    # estimates have the backbone on the meta device
    return lay_out(backbone, torch.empty(shape, device=next(backbone.parameters()).device), **arguments)


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Average mAP of each row: every seed, and the mean."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table(title="average mAP, tIoU 0.3 to 0.7, held-out videos", title_justify="left")
    table.add_column("run")
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("seconds", justify="right")
    for run in RUNS:
        own = {row["seed"]: row for row in rows if row["run"] == run.name}
        values = [own[seed]["average_mAP"] for seed in seeds]
        seconds = statistics.median(row["seconds"] for row in own.values())
        table.add_row(
            run.title, *(f"{v:.3f}" for v in values), f"{statistics.mean(values):.3f}", f"{seconds:.0f}"
        )
    return table


def draw(path: Path, rows: list[dict[str, Any]], caption: str) -> None:
    """A point for each seed, a bar for their mean."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 3.8), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    axes: Any = figure.subplots()
    for place, run in enumerate(reversed(RUNS)):
        values = [row["average_mAP"] for row in rows if row["run"] == run.name]
        axes.barh(place, statistics.mean(values), color="C0", alpha=0.35)
        axes.plot(values, [place] * len(values), "o", color="C0", markersize=4)
    axes.set_yticks(range(len(RUNS)), [run.title for run in reversed(RUNS)])
    axes.set_xlim(0, 1)
    axes.set_xlabel("average mAP, tIoU 0.3 to 0.7, held-out videos of the synthetic set")
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.005, caption, fontsize=6, color="gray")
    figure.savefig(path, dpi=150)


def main(
    data: Annotated[Path, typer.Option(help="Folder of examples.re2tal.synth.")] = Path("data/synthetic"),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/benchmark"),
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at a time, one thread each.")] = 1,
    config: Annotated[str, typer.Option(help="The experiment.")] = "synthetic",
    few: Annotated[int, typer.Option(help="The few epochs.")] = 3,
    limit: Annotated[str, typer.Option(help="Memory that the longest clip has to fit in.")] = "256MiB",
    out: Annotated[Path, typer.Option(help="Folder of the JSON and PNG files.")] = result_files.RESULTS,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.of.the.setting=value ...")] = None,
) -> None:
    """Compare training end to end, rewired and frozen, on the synthetic set.

    Example: python -m benchmarks.tal --data data/synthetic --seeds 3 --jobs 2
    """
    console, given = terminal.console(), list(overrides or [])
    base = read_config(config, [f"data.annotations={data}/annotations.json", *given])
    shared = {
        "data": str(data),
        "runs": str(runs),
        "config": config,
        "overrides": given,
        "epochs": base.optim.epochs,
        "few": few,
    }
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(of_seed, seed, shared) for seed in range(seeds)]
        for job in track(as_completed(waiting), "seeds", total=seeds, console=console):
            rows += job.result()
    rows.sort(key=lambda row: (row["seed"], [run.name for run in RUNS].index(row["run"])))
    memory = memory_of(base, limit)
    found = {
        **result_files.origin("benchmarks.tal"),
        "settings": {**base.model_dump(mode="json"), "few_epochs": few},
        "titles": {run.name: run.title for run in RUNS},
        "rows": rows,
        "memory": {"limit": limit, "rows": memory},
    }
    result_files.write(found, out / "tal.json")
    draw(out / "tal.png", rows, result_files.caption(found))
    console.print(table_of(rows))
    for row in memory:
        console.print(
            f"{row['way']:<21} held {row['held'] / 2**20:7.1f} MiB, peak {row['peak'] / 2**20:7.1f} MiB; "
            f"{row['longest_clip']} pictures fit {limit}",
            highlight=False,
        )


if __name__ == "__main__":
    typer.run(main)
