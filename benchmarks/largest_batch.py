"""The largest batch that trains in so many bytes of a GPU, and images per second at it: plain, checkpointed, rewired.

    python -m benchmarks.largest_batch --help

A whole step: forward under autocast, backward, AdamW with its state. The process is allowed so many bytes and no more
(`torch.cuda.set_per_process_memory_fraction`), so what counts is what the allocator takes, fragments and all. From the
peaks of two small batches the largest is guessed; then batches are tried until one fits and one that is 2 % larger does
not. Seconds are the median of some steps at the largest.
"""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before CUDA is touched

import torch
import typer
from rich.table import Table

from benchmarks.shared import result_files, terminal
from benchmarks.shared.strategies import chosen
from benchmarks.shared.timm_cases import Amp, timm_case
from revwire.measure.step import training_step
from revwire.measure.timing import time_alternating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.shared.step_measurement import Case

WAYS = ("plain", "checkpoint", "rewired")
FINER = 1.02
"""The batch that does not fit is so much larger than the one that does."""
_GIB = 2**30


@dataclass(frozen=True)
class Largest:
    """What one way of training reaches."""

    strategy: str
    limit_gib: float
    batch: int
    seconds: float
    images_per_second: float


class Trial:
    """Steps of one way of training, at any batch.

    Args:
        spec: timm's name of the model.
        way: One of `benchmarks.shared.strategies`.
        amp: Autocast of the forward.
    """

    def __init__(self, spec: str, way: str, amp: Amp) -> None:
        self._spec, self._amp = spec, amp
        case = self._case(2)
        self._model = chosen([way], amp.dtype)[way](case.factory(), case.inputs)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        self._stepped(2)()  # makes the optimizer's state, and whatever else stays

    def _case(self, batch: int) -> Case:
        return timm_case(f"{self._spec}@{batch}", device="cuda")

    def _stepped(self, batch: int) -> Callable[[], None]:
        case = self._case(batch)
        gradients = training_step(self._model, case.inputs, case.loss_fn, autocast=self._amp.dtype)

        def step() -> None:
            gradients()
            self._optimizer.step()

        return step

    def peak(self, batch: int) -> int:
        """Bytes that a step takes."""
        step = self._stepped(batch)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    def fits(self, batch: int) -> bool:
        """Whether two steps run."""
        try:
            step = self._stepped(batch)
            step()
            step()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return fits

    def seconds(self, batch: int, rounds: int) -> float:
        """Of a step."""
        return time_alternating({"": self._stepped(batch)}, rounds)[""].median


def largest(trial: Trial, limit: int, small: int = 16) -> int:
    """The largest batch that fits, 0 if none does."""
    one, two = trial.peak(small), trial.peak(2 * small)
    low, high = 0, 0
    guess = small + int((limit - one) / max(1, two - one) * small)
    for batch in _guesses(guess):
        if trial.fits(batch):
            low = batch
            break
        high = batch
    while low and (not high or high > int(low * FINER) + 1):
        batch = (low + high) // 2 if high else int(low * FINER) + 1
        if trial.fits(batch):
            low = batch
        else:
            high = batch
    return low


def _guesses(first: int) -> Iterator[int]:
    """A batch, and smaller ones, until there are none."""
    while first > 0:
        yield first
        first = int(first * 0.95)


def table(rows: list[Largest]) -> Table:
    """What was reached, to print."""
    shown = Table(title="largest batch", title_justify="left")
    shown.add_column("strategy")
    for heading in ("GiB", "batch", "/plain", "images a second", "/plain"):
        shown.add_column(heading, justify="right")
    plain = {row.limit_gib: row for row in rows if row.strategy == "plain" and row.batch}
    for row in rows:
        base = plain.get(row.limit_gib)
        parts = (
            (f"{row.batch / base.batch:.2f}", f"{row.images_per_second / base.images_per_second:.2f}")
            if base
            else ("", "")
        )
        shown.add_row(
            row.strategy,
            f"{row.limit_gib:g}",
            str(row.batch),
            parts[0],
            f"{row.images_per_second:.0f}",
            parts[1],
        )
    return shown


def main(
    model: Annotated[str, typer.Option("--model", "-m", help="timm model.")] = "vit_large_patch16_224",
    limit: Annotated[
        list[float] | None, typer.Option(help="GiB that may be taken; repeat; 24 and 80 if not given.")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option("--way", "-w", help=f"Repeat; {', '.join(WAYS)} if not given.")
    ] = None,
    amp: Annotated[Amp, typer.Option(help="Autocast of the forward.")] = Amp.bf16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps at the largest batch.")] = 3,
    out: Annotated[
        Path, typer.Option(help="Folder of the JSON file.", show_default="benchmarks/results")
    ] = result_files.RESULTS,
    name: Annotated[str | None, typer.Option(help="Its name; largest-batch-AMP if not given.")] = None,
) -> None:
    """Find the largest batch that trains in so much GPU memory, print it and write it down.

    Quick look: python -m benchmarks.largest_batch -m vit_tiny_patch16_224 --limit 2 --rounds 1
    """
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU: what is measured is its allocator's limit")
    console = terminal.console()
    total = torch.cuda.get_device_properties(0).total_memory
    path = out / f"{name or f'largest-batch-{amp.value}'}.json"
    rows: list[Largest] = []
    for gib in limit or (24.0, 80.0):
        if gib * _GIB > total:
            console.print(f"{gib:g} GiB: this GPU has {total / _GIB:.0f}")
            continue
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * _GIB / total))
        for each in way or WAYS:
            trial = Trial(model, each, amp)
            batch = largest(trial, int(gib * _GIB))
            seconds = trial.seconds(batch, rounds) if batch else float("nan")
            rows.append(Largest(each, gib, batch, seconds, batch / seconds if batch else 0.0))
            console.print(rows[-1])
            del trial
            gc.collect()
            torch.cuda.empty_cache()
            written = {
                **result_files.origin("benchmarks.largest_batch"),
                "method": __doc__,
                "settings": {"model": model, "amp": amp.value, "rounds": rounds},
                "rows": [asdict(row) for row in rows],
            }
            result_files.write(written, path)
    console.print(table(rows), f"written: {path}", sep="\n")


if __name__ == "__main__":
    typer.run(main)
