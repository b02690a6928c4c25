"""What `estimate` found: data that prints as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError
from revwire.printing import Printed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderResult


_SHOWN = 4


@dataclass(frozen=True)
class Estimate:
    """One training step done in one way, in bytes.

    Attributes:
        strategy: The way, by name.
        peak: Most bytes alive at once in forward, backward and optimizer step, the model and its state included.
        model: Parameters and buffers.
        gradients: All gradients, when they are there.
        optimizer: The optimizer's state.
        inputs: What the model is called with.
        activations: Activations and temporaries alone, at the moment of forward and backward when they are most.
        where: What runs when the peak is reached: a module's path, or a phase of the step.
        alive: What is alive then: (what, bytes), the largest first.
        fits: The largest size of the varied dimension whose step fits, None where not asked for; 0 if none does.
        failure: Why there are no figures, if there are none.
    """

    strategy: str
    peak: int = 0
    model: int = 0
    gradients: int = 0
    optimizer: int = 0
    inputs: int = 0
    activations: int = 0
    where: str = ""
    alive: tuple[tuple[str, int], ...] = ()
    fits: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class Estimates(Printed):
    """The same step done in several ways; prints as a table.

    Attributes:
        model: Class name of the model.
        inputs: Shapes of the tensors that its forward takes.
        optimizer: Name of the optimizer.
        autocast: dtype of the forward's autocast, `""` for none.
        accumulate: Whether gradients were there when the step began.
        limit: The bytes that `Estimate.fits` refers to, None where not asked for.
        varied: The dimension of the first input that it varies.
        rows: One for each way.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    optimizer: str
    autocast: str
    accumulate: bool
    limit: int | None
    varied: int
    rows: tuple[Estimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """The estimates as JSON-ready dicts and lists."""
        return asdict(self)

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, strategy: str) -> Estimate:
        """The row of a strategy.

        Raises:
            RevwireError: it was not estimated.
        """
        for row in self.rows:
            if row.strategy == strategy:
                return row
        names = ", ".join(row.strategy for row in self.rows)
        raise RevwireError(f"no strategy {strategy!r} was estimated, but {names}: name it in strategies=")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        amp = f", autocast {self.autocast}" if self.autocast else ""
        kept = ", gradients there before" if self.accumulate else ""
        table = Table(
            title=f"{escape(self.model)}, input {shapes}, {self.optimizer}{amp}{kept}: one training step, GiB",
            title_justify="left",
        )
        table.add_column("strategy", overflow="fold")
        for heading in ("peak", "activations", "model", "gradients", "optimizer"):
            table.add_column(heading, justify="right")
        if self.limit is not None:
            table.add_column(f"fits {self.limit / 2**30:.3g} GiB", justify="right")
        table.add_column("peak reached in, and what is alive there", overflow="fold")
        for row in self.rows:
            sizes = row.peak, row.activations, row.model, row.gradients, row.optimizer
            cells = [f"{size / 2**30:.2f}" if not row.failure else "-" for size in sizes]
            if self.limit is not None:
                cells.append("-" if row.fits is None else str(row.fits))
            alive = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in row.alive[:_SHOWN])
            table.add_row(escape(row.strategy), *cells, escape(row.failure or f"{row.where}: {alive}"))
        yield table
