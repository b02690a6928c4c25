"""Whether the check of second runs ever calls a right step wrong: every family, every coupling, every precision.

    python -m benchmarks.alarms --help

The model of each family that `benchmarks.coverage` has verified, with random weights and drop path on, is rewired in
each of the `WAYS` and does some training steps on fresh random inputs, a step of SGD after each. All are right, so a
`ReplayError` that speaks of other numbers is a false alarm. What else goes wrong is listed too. A sweep that was
stopped goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import Progress

import revwire
from benchmarks.shared import result_files, terminal
from benchmarks.shared.coverage_models import by_key
from benchmarks.shared.diary import Diary
from benchmarks.shared.workers import at_most, in_workers
from revwire.libraries.inputs import call_arguments
from revwire.measure.step import training_step

if TYPE_CHECKING:
    from torch import nn

WAYS: dict[str, tuple[dict[str, Any], torch.dtype | None]] = {
    "re2tal": ({}, None),
    "re2tal, bf16": ({}, torch.bfloat16),
    "re2tal, fp16": ({}, torch.float16),
    "re2tal, anchored": ({"anchor": "*", "transitions": "checkpoint"}, None),
    "bdia": ({"coupling": "bdia"}, None),
    "bdia, bf16": ({"coupling": "bdia"}, torch.bfloat16),
    "bdia, exact": ({"coupling": "bdia", "exact": True}, None),
    "dr2net": ({"coupling": "dr2net"}, None),
    "momentum(0.5)": ({"coupling": revwire.Momentum(0.5)}, None),
    "momentum(0.9)": ({"coupling": revwire.Momentum(0.9)}, None),
}
STEPS = 3
PATIENCE_S = 900
ALARM = "gives other numbers than in forward"


@dataclass(frozen=True)
class Swept:
    """One family: how many steps ran, and what was raised, by way."""

    key: str
    steps: int
    seconds: float
    alarms: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def sweep_one(key: str, shape: tuple[int, ...], steps: int) -> Swept:
    """All ways on one model; never raises.

    Args:
        key: Of the model in the coverage sweep.
        shape: Of the input that it was verified with.
        steps: Training steps of each way.
    """
    start, done = time.perf_counter(), 0
    alarms: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, (how, autocast) in WAYS.items():
        try:
            with at_most(PATIENCE_S), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, inputs = _built(key, shape)
                revwire.rewire(model, inputs, **how)
                for seed in range(steps):
                    _step(model.train(), inputs, autocast, seed)
                    done += 1
        except revwire.ReplayError as error:
            (alarms if ALARM in str(error) else errors)[name] = str(error)[:300]
        except Exception as error:  # noqa: BLE001 - a sweep goes on, and reports it
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    return Swept(key, done, round(time.perf_counter() - start, 1), alarms, errors)


def _built(key: str, shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    """A model as it was verified, with what drops at random on."""
    problem: Exception | None = None
    for build in by_key()[key].small:
        torch.manual_seed(0)
        try:
            model, inputs = build(True)
            args, kwargs = call_arguments(model, inputs)
        except Exception as error:  # noqa: BLE001 - too small an input, mostly: the next one is larger
            problem = error
            continue
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if not shape or (tensors and tuple(tensors[0].shape) == shape):
            return model, inputs
    raise problem or RuntimeError(f"{key}: no build takes an input of shape {shape}")


def _step(model: nn.Module, inputs: Any, autocast: torch.dtype | None, seed: int) -> None:
    torch.manual_seed(seed)
    args, kwargs = call_arguments(model, inputs)
    fresh = [torch.randn_like(a) if _is_noise(a) else a for a in args]
    named = {key: torch.randn_like(a) if _is_noise(a) else a for key, a in kwargs.items()}
    training_step(model, named or fresh, autocast=autocast)()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad / parameter.grad.norm().clamp_min(1e-6), alpha=-1e-3)


def _is_noise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def main(
    only: Annotated[str, typer.Option(help="Glob of SOURCE/NAME, such as 'timm/vit_*'.")] = "*",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each way.")] = STEPS,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = os.cpu_count() or 1,
    fresh: Annotated[bool, typer.Option(help="Start anew instead of going on.")] = False,
) -> None:
    """Train every family in every way, and count the steps that the check calls wrong.

    One family: python -m benchmarks.alarms --only 'timm/convnext*'
    """
    console, path = terminal.console(), result_files.RESULTS / "alarms.json"
    diary = Diary(path.with_suffix(".partial.jsonl"), fresh=fresh)
    swept = {row["key"]: Swept(**row) for row in diary.rows()}
    verified = json.loads((result_files.RESULTS / "coverage.json").read_text("utf-8"))["verified"]
    chosen = {
        f"{row['source']}/{row['name'].partition(',')[0]}": (tuple(row["input"]), row["seconds"])
        for row in verified
    }
    wanted = sorted((key for key in chosen if fnmatchcase(key, only)), key=lambda key: chosen[key][1])
    calls = [(sweep_one, (key, chosen[key][0], steps)) for key in wanted if key not in swept]
    with Progress(console=console) as progress:
        for row in in_workers(workers, calls, progress, "train"):
            swept[row.key] = row
            diary.write(row)
    rows = [swept[key] for key in wanted]
    alarms = [(row.key, way, text) for row in rows for way, text in row.alarms.items()]
    errors = [(row.key, way, text) for row in rows for way, text in row.errors.items()]
    for title, found in (("false alarm", alarms), ("error", errors)):
        for key, way, text in found:
            console.print(f"{title}: {key}, {way}: {text}", markup=False)
    total = sum(row.steps for row in rows)
    console.print(
        f"{len(rows)} families, {total} steps: {len(alarms)} false alarms, {len(errors)} other errors"
    )
    if only == "*":
        written = {**result_files.origin("benchmarks.alarms"), "method": __doc__, "ways": list(WAYS)}
        summary = {"families": len(rows), "steps": total, "false_alarms": len(alarms), "errors": len(errors)}
        document = {**written, **summary, "rows": [asdict(row) for row in rows]}
        console.print("written:", str(result_files.write(document, path)))
        diary.path.unlink(missing_ok=True)
    if alarms:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
