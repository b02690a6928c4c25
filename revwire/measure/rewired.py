"""A model rewired as the arguments of `revwire.rewire` say: with dials turned, a plan made earlier, or a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire.errors import RewireError
from revwire.measure.budget import dials_within
from revwire.planning.dials import Dials, Globs, Transitions
from revwire.rewrite.recording import Recording, fitting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from revwire.measure.budget import Budget
    from revwire.planning.plan import Plan
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Grid


def rewired(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Coupling = "re2tal",
    exact: bool | int | Grid = False,
    include: Globs = None,
    exclude: Globs = None,
    chunks: int | Mapping[str, int] = 1,
    keep: Globs | int = None,
    anchor: Globs = None,
    transitions: Transitions = "keep",
    budget: str | int | Budget | None = None,
    plan: Plan | None = None,
    compile: bool = False,  # noqa: A002 - as torch and Lightning name it
    overlap: bool = False,
) -> tuple[nn.Module, Plan]:
    """Rewire a model in place; the arguments are those of `revwire.rewire`.

    Returns:
        The same model, and the plan that it now runs.

    Raises:
        RewireError: as `revwire.rewire`.
    """
    dials = Dials(chunks, keep, anchor, transitions)
    if (plan is not None) + (budget is not None) + (dials != Dials()) > 1:
        raise RewireError(
            "chunks, keep, anchor and transitions are part of a plan, and chosen by a budget: pass one"
        )
    recording = Recording.of(model, example_inputs, coupling, exact, include, exclude)
    if budget is not None:
        dials = dials_within(model, example_inputs, budget, recording, overlap=overlap)
    if plan is None:
        chosen = dials.turned(recording.fresh, recording.found)
    else:
        chosen = fitting(plan, recording.fresh, recording.found)
    return recording.rewire(model, chosen, compiled=compile, overlap=overlap), chosen
