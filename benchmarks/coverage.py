"""Every architecture, planned; one of each family, verified.

    python -m benchmarks.coverage --help

Each architecture is planned on the meta device, its bytes between forward and backward are counted before and after
rewiring, and its residual additions are counted a second time by other means
(`benchmarks.shared.residual_counter`). The smallest rewired model of each family then goes through the whole
`revwire.verify` with real tensors. A sweep that was stopped goes on where it stopped; one that finds a model worse off
than the committed results fails.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.nn.modules.batchnorm import _BatchNorm

import revwire
from benchmarks.shared import coverage_report, result_files, terminal
from benchmarks.shared.coverage_models import SOURCES, Entry, by_key, entries, fewer_blocks
from benchmarks.shared.coverage_report import Planned, Verified
from benchmarks.shared.diary import Diary
from benchmarks.shared.residual_counter import ResidualCounter
from benchmarks.shared.workers import at_most, in_workers
from revwire import ReplayError
from revwire.find.probe import probe
from revwire.libraries.inputs import call_arguments
from revwire.measure.live_bytes import LiveBytes
from revwire.planning.chains import make_plan
from revwire.rewrite.swap import apply_plan
from revwire.run.coupling import Re2TAL
from revwire.run.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from revwire.planning.plan import Plan

NAME = "coverage"
PATIENCE_S = 600
VALUES_A_CHANNEL = 8


def plan_one(key: str, bytes_up_to: float = float("inf")) -> Planned:
    """Plan one architecture, count its bytes if it has no more parameters than `bytes_up_to`; never raises."""
    entry = by_key()[key]
    about = entry.source, entry.family, entry.name
    try:
        with at_most(PATIENCE_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _plan(entry, bytes_up_to)
    except Exception as error:  # noqa: BLE001 - a sweep goes on, and reports it
        return Planned(*about, "failed", reason=f"{type(error).__name__}: {error}"[:300])


def _plan(entry: Entry, bytes_up_to: float) -> Planned:
    model, inputs = entry.outline()
    args, kwargs = call_arguments(model, inputs)
    model.eval()
    start = time.perf_counter()
    found = probe(model, args, kwargs)
    plan = make_plan(found, "re2tal")
    about = entry.source, entry.family, entry.name
    figures: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if not plan.chains:
        with torch.no_grad(), ResidualCounter() as counter:
            model(*args, **kwargs)
        reason = coverage_report.reason_of(plan)
        return Planned(*about, "cannot", residuals=counter.longest, **figures, reason=reason)
    if figures["parameters"] <= bytes_up_to:
        model.train()
        figures["held"] = _held(model, args, kwargs)
        apply_plan(model, plan, found, Options(Re2TAL()))
        del found
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*runs the original forward.*")
            model(*args, **kwargs)  # the first call in train mode may trace again
            figures["held_rewired"] = _held(model, args, kwargs)
    return Planned(*about, "rewired", tuple(len(chain.steps) for chain in plan.chains), **figures)


def _held(model: Any, args: Any, kwargs: Any) -> int:
    gc.collect()
    with LiveBytes() as meter:
        output = model(*args, **kwargs)
        held = meter.live
    del output
    return held


def verify_one(key: str, chains: tuple[int, ...]) -> Verified:
    """Verify one architecture at the smallest input that leaves its chains as they are; never raises."""
    entry = by_key()[key]
    fewer = fewer_blocks(entry.source, entry.name)
    about = entry.source, entry.family, entry.name + (f", {fewer['depth']} blocks" if fewer else "")
    start = time.perf_counter()
    error: Exception | None = None
    for build in entry.small:
        try:
            with at_most(PATIENCE_S), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                model, inputs = build(False)
                plan = revwire.plan(model.eval(), inputs)
                found = tuple(len(chain.steps) for chain in plan.chains)
                same = len(found) == len(chains) if fewer else found == chains
                if not same or not _well_posed(model, plan):
                    continue
                model, inputs = build(True)
                report = revwire.verify(model, inputs)
        except ReplayError as problem:
            return Verified(*about, ok=False, failed=f"ReplayError: {problem}")
        except Exception as problem:  # noqa: BLE001 - too small an input, mostly: the next one is larger
            error = problem
            continue
        worst = {c.name: c.figure for c in report.checks}
        failed = "; ".join(
            f"{c.name}: {c.figure:.2g} > {c.bound:.2g} {c.detail}" for c in report.checks if not c.ok
        )
        precise, single = (
            max(
                value for name, value in worst.items() if name.startswith("gradients") and name.endswith(kind)
            )
            for kind in ("float64", "float32")
        )
        args, kwargs = call_arguments(model, inputs)
        shape = next((tuple(t.shape) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), ())
        seconds = round(time.perf_counter() - start, 1)
        return Verified(*about, report.ok, shape, precise, single, seconds, failed)
    return Verified(*about, ok=False, failed=f"{type(error).__name__}: {error}"[:300])


def _well_posed(model: torch.nn.Module, plan: Plan) -> bool:
    """Whether BatchNorm in training has enough values a channel: of two, it makes a sign and no gradient."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return True
    values = (torch.Size(step.trunk).numel() // max(step.trunk[1:]) for step in plan.steps)
    return all(count >= VALUES_A_CHANNEL for count in values)


def representatives(rows: Iterable[Planned]) -> list[Planned]:
    """The rewired model with the fewest parameters of each family."""
    smallest: dict[tuple[str, str], Planned] = {}
    for row in rows:
        if row.verdict == "rewired":
            known = smallest.setdefault((row.source, row.family), row)
            if row.parameters < known.parameters:
                smallest[row.source, row.family] = row
    return list(smallest.values())


def done(diary: Diary) -> tuple[dict[str, Planned], dict[str, Verified]]:
    """What a diary holds: rows by architecture, verified representatives by family."""
    planned: dict[str, Planned] = {}
    verified: dict[str, Verified] = {}
    for data in diary.rows():
        row = coverage_report.row(data)
        if isinstance(row, Planned):
            planned[row.key] = row
        else:
            verified[row.key] = row
    return planned, verified


def main(
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", help=f"{', '.join(SOURCES)}; repeat; all if not given."),
    ] = None,
    only: Annotated[str, typer.Option(help="Glob of SOURCE/NAME, such as 'timm/vit_*'.")] = "*",
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = os.cpu_count() or 1,
    verify: Annotated[bool, typer.Option(help="Verify a model of each family too.")] = True,
    bytes_up_to: Annotated[
        float, typer.Option(help="Count bytes only of models of at most so many million parameters.")
    ] = float("inf"),
    fresh: Annotated[
        bool, typer.Option(help="Start anew instead of going on where a sweep was stopped.")
    ] = False,
    accept: Annotated[bool, typer.Option(help="Write the results down even where they got worse.")] = False,
) -> None:
    """Plan every architecture, verify one of each family, compare with the committed results, write them down.

    The whole sweep: python -m benchmarks.coverage

    One family: python -m benchmarks.coverage --only 'timm/convnext*'
    """
    console = terminal.console()
    chosen = tuple(source or SOURCES)
    if unknown := [s for s in chosen if s not in SOURCES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SOURCES)}", param_hint="--source")
    wanted = [e.key for e in entries(chosen) if fnmatchcase(e.key, only)]
    diary = Diary(result_files.RESULTS / f"{NAME}.partial.jsonl", fresh=fresh)
    planned, verified = done(diary)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        limit = bytes_up_to * 1e6
        calls = [(plan_one, (key, limit)) for key in wanted if key not in planned]
        for row in in_workers(workers, calls, progress, "plan"):
            planned[row.key] = row
            diary.write(row)
        if verify:
            chosen_rows = representatives(planned[key] for key in wanted)
            todo = [r for r in chosen_rows if f"{r.source}/{r.family}" not in verified]
            calls = [(verify_one, (row.key, row.chains)) for row in todo]
            for result in in_workers(workers, calls, progress, "verify"):
                verified[result.key] = result
                diary.write(result)
    rows = [planned[key] for key in wanted]
    reports = [v for v in verified.values() if any(v.key == f"{r.source}/{r.family}" for r in rows)]
    console.print(coverage_report.summary(rows, reports))
    whole = only == "*" and chosen == tuple(SOURCES) and verify
    worse = coverage_report.worse(result_files.RESULTS / f"{NAME}.json", rows, reports)
    for line in worse:
        console.print(f"[red]worse than before:[/] {line}")
    if whole and (not worse or accept):
        coverage_report.save(rows, reports, statistics.median(r.seconds for r in rows))
        diary.path.unlink(missing_ok=True)
    wrong = [r for r in reports if not r.ok] + [r for r in rows if r.missed or r.verdict == "failed"]
    if worse or wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
