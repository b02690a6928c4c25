"""What will be rewired, and why not the rest: data only.

A `Plan` is made of chains, a `Chain` of steps, and a `Step` is one residual addition of one module's frame (the
code of that module's own `forward`). Everything a plan left alone stands in `Plan.skipped` with its reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, MinLen

from revwire.errors import RewireError
from revwire.planning.schema import Strict, read
from revwire.printing import Printed
from revwire.run.options import Mode  # noqa: TC001 - read off the annotations
from revwire.run.slices import Slices

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Step(Strict):
    """One residual addition, `x[i+1] = a*x[i-1] + b*x[i] + c*F(x[i])` once rewired.

    Attributes:
        module: Path of the module whose frame holds the addition; `""` is the model itself.
        residual: Which residual addition of that frame, counted from 0 in the order they run.
        trunk: Shape of the trunk where the planning run saw it, batch dimension first.
        branch: Paths of the child modules the residual branch calls, relative to `module`.
        sides: Names of what else the branch reads from its frame (a rope table, a mask).
        post: The operation after the addition that moves into the branch (an activation), if there is one.
        scale: What multiplies the trunk in the addition, if it is not added as it is; the branch is then the whole
            block less the trunk, `F(x) = s * x + f(x) - x`.
        block: Whether it is no addition but a child of an `nn.Sequential`, `F(x) = G(x) - x`.
        line: `file.py:123`, where the addition stands in the source.
        mode: What it holds for backward: `"reverse"` nothing, `"anchor"` the input of the step before it, which is
            not reconstructed then, `"keep"` the graph of its branch, which is not run again then.
        slices: Into how many slices the trunk is cut to run the branch, along dimension `slice_dim`.
        slice_dim: That dimension; -1: the trunk is not cut.
        sliced_sides: Which side inputs are cut along their first dimension too.
        inside: Whether the branch's softmax attention runs in slices, as many as the trunk is short of slices.
    """

    module: str
    residual: Annotated[int, Ge(0)]
    trunk: tuple[int, ...]
    branch: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    post: str | None = None
    scale: str | None = None
    block: bool = False
    line: str = ""
    mode: Mode = "reverse"
    slices: Annotated[int, Ge(1)] = 1
    slice_dim: Annotated[int, Ge(-1)] = 0
    sliced_sides: tuple[bool, ...] = ()
    inside: bool = False

    @property
    def name(self) -> str:
        """The step as one word: `blocks.3#0`."""
        return f"{self.module or '(model)'}#{self.residual}"

    @property
    def slicing(self) -> Slices | None:
        """How its trunk is cut, None: not at all."""
        return (
            Slices(self.slice_dim, self.slices, self.sliced_sides)
            if self.slices > 1 and self.slice_dim >= 0
            else None
        )


@dataclass(frozen=True)
class Chain(Strict):
    """Steps that follow each other on one trunk; only what enters and what leaves is kept for backward.

    Attributes:
        steps: In the order they run.
        open: Whether it hands on both streams, to a module of `Plan.recomputed`.
    """

    steps: Annotated[tuple[Step, ...], MinLen(1)]
    open: bool = False

    @property
    def name(self) -> str:
        """First and last module of the chain: `blocks.0 .. blocks.11`."""
        first, last = self.steps[0].module or "(model)", self.steps[-1].module or "(model)"
        return first if first == last else f"{first} .. {last}"


@dataclass(frozen=True)
class Skipped(Strict):
    """A residual-looking place that stays as it is, and why, in plain words."""

    module: str
    reason: str


@dataclass(frozen=True)
class Joined(Strict):
    """Children that one module's forward calls one after the other, to run again in backward as one.

    Attributes:
        module: Path of the module whose forward calls them; `""` is the model itself.
        children: Their paths relative to `module`, in the order they run.
    """

    module: str
    children: Annotated[tuple[str, ...], MinLen(1)]

    @property
    def paths(self) -> tuple[str, ...]:
        """Their paths in the model."""
        return tuple(f"{self.module}.{child}".lstrip(".") for child in self.children)

    @property
    def name(self) -> str:
        """All of them as one word: `conv1+bn1+act1+maxpool`."""
        return "+".join(self.paths)


@dataclass(frozen=True)
class Plan(Printed, Strict):
    """What `rewire` does to one model. Print it, compare it, or keep it as JSON (`to_json`, `from_json`).

    Attributes:
        model: Class name of the planned model.
        coupling: Name and coefficients of the coupling the steps will use.
        chains: The chains, in the order they run.
        skipped: What is left alone, with reasons.
        exact: Whether streams are in fixed point; a number is that of the bits after the point.
        warnings: What will not come out well, in plain words.
        unsliced: Steps that run on the whole batch although slices were asked for, with reasons.
        recomputed: Modules between the chains that run again in backward from their stored input.
        joined: Modules that do so together, from the input of the first.
    """

    model: str
    coupling: str
    chains: tuple[Chain, ...]
    skipped: tuple[Skipped, ...] = ()
    exact: bool | int = False
    warnings: tuple[str, ...] = ()
    unsliced: tuple[Skipped, ...] = ()
    recomputed: tuple[str, ...] = ()
    joined: tuple[Joined, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of all chains, in the order they run."""
        return tuple(step for chain in self.chains for step in chain.steps)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready dicts and lists."""
        return asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Build a plan from `to_dict`'s form.

        Raises:
            RewireError: `data` is not a plan; the message names the field at fault.
        """
        return read(Plan, data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Build a plan from `to_json`'s text.

        Raises:
            RewireError: `text` is not JSON, or not a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RewireError(f"not a plan: {error}") from error
        return cls.from_dict(data)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        count = sum(len(chain.steps) for chain in self.chains)
        table = Table(
            title=f"{escape(self.model)}: {_plural(count, 'step')} in {_plural(len(self.chains), 'chain')}, "
            f"coupling {escape(self.coupling)}{', exact' if self.exact is not False else ''}",
            title_justify="left",
        )
        for heading in ("chain", "steps", "trunk", "branch of each step"):
            table.add_column(heading, overflow="fold")
        for chain in self.chains:
            trunks = dict.fromkeys("x".join(map(str, step.trunk[1:])) for step in chain.steps)
            kinds = dict.fromkeys(_describe(step) for step in chain.steps)
            table.add_row(
                escape(chain.name), str(len(chain.steps)), " / ".join(trunks), escape("\n".join(kinds))
            )
        yield table
        if again := (*(joined.name for joined in self.joined), *self.recomputed):
            yield f"run again in backward from their input: {escape(', '.join(again))}"
        for warning in self.warnings:
            yield f"[yellow]warning:[/] {escape(warning)}"
        for title, places in (("run on the whole batch", self.unsliced), ("left as it is", self.skipped)):
            if places:
                left = Table(title=title, title_justify="left")
                left.add_column("module", overflow="fold")
                left.add_column("why", overflow="fold")
                for alike in _alike(places):
                    more = f" (and {len(alike) - 1} like it)" if len(alike) > 1 else ""
                    left.add_row(escape(f"{alike[0].module or '(model)'}{more}"), escape(alike[0].reason))
                yield left


def _alike(skipped: tuple[Skipped, ...]) -> list[list[Skipped]]:
    """Skipped places grouped by what they say, whatever the numbers in it."""
    groups: dict[str, list[Skipped]] = {}
    for place in skipped:
        groups.setdefault(re.sub(r"\d+", "#", f"{place.module}: {place.reason}"), []).append(place)
    return list(groups.values())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _describe(step: Step) -> str:
    text = " ".join(step.branch) or "(functions)"
    if step.block:
        text += " | whole, less its input"
    if step.scale:
        text += f" | {step.scale} scales the trunk"
    if step.post:
        text += f" | {step.post} after the sum moves in"
    if step.sides:
        text += f" | reads {' '.join(step.sides)}"
    if step.slices > 1:
        text += f" | in {step.slices} slices"
        text += f" of dimension {step.slice_dim}" if step.slice_dim > 0 else ""
        text += (" of its attention" if step.slice_dim < 0 else " or of its attention") if step.inside else ""
    if step.mode != "reverse":
        text += {"anchor": " | input of the step before kept", "keep": " | graph kept"}[step.mode]
    return text
