"""What a run tells: a line of JSON for every step, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.re2tal.console import terminal
from revwire.checkpoint.disk import write_text
from revwire.checkpoint.signals import held_signals

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Log:
    """The log of a run; in processes other than the first it does nothing.

    Args:
        folder: Where `log.jsonl` and TensorBoard's files go.
        enabled: Whether this process writes.
        step: The step that the run goes on from: what was logged after it is dropped, as it is run again.
        total: How many steps there will be.
        quiet: Write the files only.
    """

    def __init__(self, folder: Path, *, enabled: bool, step: int, total: int, quiet: bool = False) -> None:
        self._enabled = enabled
        self.console = terminal(stderr=True, quiet=quiet or not enabled)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(8),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, TextColumn("{task.fields[told]}"), console=self.console, disable=not enabled
        )
        self._task = self._bar.add_task("training", total=total, completed=step, told="")
        self._board: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        lines = [line for line in history(path) if line["step"] <= step] if step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with held_signals():
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def step(self, step: int, **values: float) -> None:
        """Tell of an optimizer step."""
        if not self._enabled:
            return
        # JSON has no infinity, which is the gradient norm of a step that fp16 skips
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        shown = "  ".join(form.format(values[name]) for name, form in _SHOWN.items() if name in values)
        # cut in two, a put into TensorBoard's queue leaves its close() waiting for ever
        with held_signals():
            self._file.write(json.dumps({"step": step, **told}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            self._bar.update(self._task, completed=step, told=shown)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)

    def __enter__(self) -> Self:
        """Show the progress bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        with held_signals():
            self._bar.stop()
            if self._enabled:
                self._file.close()
                if self._board is not None:
                    self._board.close()


_SHOWN = {
    "loss": "loss {:.3g}",
    "frames_per_second": "{:.0f} frames/s",
    "waiting": "{:.0%} waiting",
    "gib": "{:.1f} GiB",
}
"""What the progress line tells, which has to fit 80 columns."""


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def peak_gib(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    if told:  # getrusage would tell the memory of the process that started this one, where that had more
        return int(told[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
