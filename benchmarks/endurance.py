"""Whether memory stays flat over a long life: new shapes, new classes, and steps without end.

    python -m benchmarks.endurance --help

Each life runs in a process of its own, and its resident memory is read after a tenth of it (torch's own pools have
filled by then) and at its end: as it is, and once the C library has given back to the system what it holds free. Flat
is what has grown by less than `FLAT` bytes in use; the rest is how malloc scatters what comes and goes. Shapes come in
random order: the largest are not the last.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table
from torch import nn

import revwire
from benchmarks.shared import result_files, terminal
from revwire.printing import in_words

if TYPE_CHECKING:
    from collections.abc import Callable

FLAT = 20 * 2**20
WIDTH = 16


class Block(nn.Module):
    """A residual block whose code looks at the shape: each new one is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles what is longer than any input here."""
        if x.shape[1] > 10**6:
            x = x * 2
        return x + self.branch(x)


def _net(block: Callable[[], nn.Module], depth: int = 3) -> nn.Module:
    return nn.Sequential(*(block() for _ in range(depth)))


def _step(model: nn.Module, batch: int, length: int) -> None:
    model(torch.randn(batch, length, WIDTH)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def shapes() -> Callable[[int], None]:
    """A step on an input of another shape each time."""
    model = revwire.rewire(_net(Block), torch.zeros(2, 5, WIDTH))
    order = torch.randperm(LIVES["shapes"][1], generator=torch.Generator().manual_seed(0)).tolist()
    return lambda number: _step(model, 1 + order[number] % 100, 2 + order[number] // 100)


def rewirings() -> Callable[[int], None]:
    """A model of a class of its own each time: made, rewired, trained one step, dropped."""

    def live(number: int) -> None:
        own = type(f"Block{number}", (Block,), {"forward": Block.forward})
        _step(revwire.rewire(_net(own, 2), torch.zeros(2, 5, WIDTH)), 2, 5)

    return live


def steps() -> Callable[[int], None]:
    """A step on inputs of one shape, the mode changed now and then."""
    model = revwire.rewire(_net(Block), torch.zeros(2, 5, WIDTH))
    return lambda number: _step(model.train(number % 100 < 90), 2, 5)


LIVES = {"shapes": (shapes, 10_000), "rewirings": (rewirings, 1_000), "steps": (steps, 100_000)}


@dataclass(frozen=True)
class Memory:
    """Bytes of this process that are in memory, as it is, and without what malloc holds free."""

    resident: int
    used: int

    @classmethod
    def now(cls) -> Memory:
        """As it is, after a collection."""
        gc.collect()
        resident = _resident()
        if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)
        return cls(resident, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def live(name: str, count: int) -> tuple[Memory, Memory]:
    """What is in memory after a tenth of a life, and at its end."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(_enabled=False)  # keeps the kernels of a thousand shapes, of any model
    act = LIVES[name][0]()
    early = Memory(0, 0)
    for number in range(count):
        act(number)
        if number == count // 10:
            early = Memory.now()
    return early, Memory.now()


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(LIVES)}; repeatable.")] = None,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Live that part of each only.")] = 1.0,
) -> None:
    """Live long, and tell how much memory has grown.

    A quick look: python -m benchmarks.endurance --share 0.05
    """
    console = terminal.console()
    table = Table(title="memory", title_justify="left")
    for heading in ("life", "times", "used after a tenth", "at the end", "growth", "growth of all"):
        table.add_column(heading, justify="left" if heading == "life" else "right")
    rows, grown = [], False
    for name in only or LIVES:
        count = max(10, int(LIVES[name][1] * share))
        console.print(f"{name}: {count} times …")
        with get_context("spawn").Pool(1) as pool:
            early, late = pool.apply(live, (name, count))
        growth, of_all = late.used - early.used, late.resident - early.resident
        grown |= growth > FLAT
        rows.append(
            {"life": name, "times": count, "early": asdict(early), "late": asdict(late), "growth": growth}
        )
        sizes = early.used, late.used, max(0, growth), max(0, of_all)
        table.add_row(name, str(count), *map(in_words, sizes))
    console.print(table)
    if share == 1 and not only:
        document = {**result_files.origin("benchmarks.endurance"), "method": __doc__, "rows": rows}
        console.print("written:", str(result_files.write(document, result_files.RESULTS / "endurance.json")))
    if grown:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
