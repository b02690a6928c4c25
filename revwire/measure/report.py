"""What `verify` found: data that prints as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from revwire.measure.drift import Drifts
from revwire.printing import Printed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Check:
    """One promise, measured.

    Attributes:
        name: What was compared.
        figure: What was measured.
        bound: The most that `figure` may be.
        detail: Where the figure comes from.
    """

    name: str
    figure: float
    bound: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the figure is within its bound; a NaN is not."""
        return self.figure <= self.bound


@dataclass(frozen=True)
class Report(Printed):
    """The checks of one model, and how far its chains drift; prints as tables."""

    model: str
    checks: tuple[Check, ...]
    drift: Drifts = field(default_factory=Drifts)

    @property
    def ok(self) -> bool:
        """Whether every check is within its bound."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready dicts and lists."""
        return {
            "model": self.model,
            "ok": self.ok,
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
            "drift": [asdict(drift) for drift in self.drift.chains],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        verdict = "[green]verified[/]" if self.ok else "[red]NOT verified[/]"
        table = Table(title=f"{escape(self.model)}: {verdict}", title_justify="left")
        table.add_column("check", overflow="fold")
        table.add_column("measured", justify="right")
        table.add_column("at most", justify="right")
        table.add_column("")
        table.add_column("where", overflow="fold")
        for check in self.checks:
            mark = "[green]ok[/]" if check.ok else "[red]FAILED[/]"
            table.add_row(check.name, f"{check.figure:.2g}", f"{check.bound:.2g}", mark, escape(check.detail))
        yield table
        yield self.drift
