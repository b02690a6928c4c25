"""Turning the dials of a plan: what each step holds for backward, and in how many slices its branch runs.

None of them changes what is computed; they trade bytes for seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from revwire.errors import RewireError
from revwire.find.alike import kind_of
from revwire.planning.plan import Skipped
from revwire.planning.slicing import attention_refusal, refusal_of, slices_for
from revwire.planning.transitions import find_transitions, transitions_refused

if TYPE_CHECKING:
    from revwire.find.probe import Probe
    from revwire.planning.plan import Plan, Step
    from revwire.run.options import Mode

Globs = str | Sequence[str] | None
Transitions = Literal["keep", "checkpoint"]
"""What the blocks between chains hold for backward: all that autograd saves, or their input."""


@dataclass(frozen=True)
class Dials:
    """What `rewire` is told beside the coupling.

    Attributes:
        chunks: Into how many slices of the batch each branch runs; or globs of steps and how many theirs do. Where the
            batch has fewer samples, the softmax attention that a branch writes out runs in slices instead.
        keep: Globs of steps that keep the graph of their branch; or how many steps of each chain do, from its
            beginning, where that costs nothing beside the graph.
        anchor: Globs of steps that keep the input of the step before them.
        transitions: `"checkpoint"` to have the blocks between chains run again in backward from their stored input.
    """

    chunks: int | Mapping[str, int] = 1
    keep: Globs | int = None
    anchor: Globs = None
    transitions: Transitions = "keep"

    def turned(self, plan: Plan, found: Probe) -> Plan:
        """The plan with these dials turned.

        Raises:
            RewireError: a glob that no step matches, a number of slices below 1, or no step that can be cut.
        """
        chunks = {"*": self.chunks} if isinstance(self.chunks, int) else dict(self.chunks)
        if any(not isinstance(n, int) or n < 1 for n in chunks.values()):
            raise RewireError(f"chunks must be whole numbers of at least 1, not {self.chunks!r}")
        if isinstance(self.keep, int) and self.keep < 0:
            raise RewireError(f"keep must be at least 0, not {self.keep}")
        keep = () if isinstance(self.keep, int) else globs_of(self.keep) or ()
        anchor = globs_of(self.anchor) or ()
        for name, globs in (("chunks", chunks), ("keep", keep), ("anchor", anchor)):
            for glob in globs:
                if plan.chains and not any(_matches(step, glob) for step in plan.steps):
                    known = ", ".join(step.name for step in plan.steps[:4])
                    raise RewireError(f"{name}: no step matches {glob!r}; steps are named {known}, ...")
        chains = []
        for chain in plan.chains:
            first = self.keep if isinstance(self.keep, int) else 0
            modes = [_mode(step, i < first, keep, anchor) for i, step in enumerate(chain.steps)]
            steps = (replace(step, mode=mode) for step, mode in zip(chain.steps, modes, strict=True))
            chains.append(replace(chain, steps=tuple(steps)))
        if self.transitions not in get_args(Transitions):
            raise RewireError(
                f"transitions is one of {', '.join(get_args(Transitions))}, not {self.transitions!r}"
            )
        plan = replace(plan, chains=tuple(chains))
        if self.transitions == "checkpoint":
            plan = find_transitions(plan, found)
        return _sliced(plan, chunks, found)


def check_dials(plan: Plan, found: Probe) -> None:
    """Prove again for this model what a plan that was made elsewhere takes for granted.

    Raises:
        RewireError: a branch cannot be cut as planned, or there is no module to run again.
    """
    proven = set[tuple[Any, ...]]()
    for step in plan.steps:
        residual = found.residual(step)
        if step.slices == 1 or residual is None:
            continue
        kind = (*kind_of(residual), step.slicing, step.inside)
        if (
            kind not in proven
            and (
                why_not := refusal_of(
                    residual, step.slicing, found.training.trained(residual), inside=step.inside
                )
            )
            is not None
        ):
            raise RewireError(f"the plan runs {step.name} in slices, and here {why_not}; plan again")
        proven.add(kind)
    if (why_not := transitions_refused(plan, found)) is not None:
        raise RewireError(f"the plan does not fit: {why_not}; plan again")


def globs_of(globs: Globs) -> tuple[str, ...] | None:
    """One glob or several as a tuple."""
    return (globs,) if isinstance(globs, str) else None if globs is None else tuple(globs)


def _matches(step: Step, glob: str) -> bool:
    return fnmatchcase(step.name, glob) or fnmatchcase(step.module, glob)


def _mode(step: Step, first: bool, keep: Sequence[str], anchor: Sequence[str]) -> Mode:
    if first or any(_matches(step, glob) for glob in keep):
        return "keep"
    return "anchor" if any(_matches(step, glob) for glob in anchor) else "reverse"


def _sliced(plan: Plan, chunks: Mapping[str, int], found: Probe) -> Plan:
    if not plan.chains or all(n == 1 for n in chunks.values()):
        return plan
    unsliced: list[Skipped] = []

    def cut(step: Step) -> Step:
        slices = max((n for glob, n in chunks.items() if _matches(step, glob)), default=1)
        residual = found.residual(step)
        if slices == 1 or residual is None:
            return step
        kind = kind_of(residual)
        if kind not in found.sliceable:
            found.sliceable[kind] = slices_for(residual, found.training.trained(residual))
        proven = found.sliceable[kind]
        dim, sides = (-1, ()) if isinstance(proven, str) else proven
        inside = False
        if dim < 0 or step.trunk[dim] < slices:
            if kind not in found.attention_refusals:
                found.attention_refusals[kind] = attention_refusal(residual, found.training.trained(residual))
            inside = found.attention_refusals[kind] is None
        if isinstance(proven, str) and not inside:
            unsliced.append(Skipped(step.name, proven))
            return step
        return replace(step, slices=slices, slice_dim=dim, sliced_sides=sides, inside=inside)

    chains = tuple(replace(chain, steps=tuple(map(cut, chain.steps))) for chain in plan.chains)
    if not any(step.slices > 1 for chain in chains for step in chain.steps):
        why = "; ".join(f"{s.module}: {s.reason}" for s in unsliced[:2])
        raise RewireError(f"chunks: no branch of {plan.model} can run slice by slice: {why}")
    return replace(plan, chains=chains, unsliced=tuple(dict.fromkeys(unsliced)))
