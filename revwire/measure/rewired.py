"""A model rewired as the arguments of `revwire.rewire` say: with dials turned, a plan made earlier, or a budget."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from revwire.errors import RewireError
from revwire.measure.budget import dials_within
from revwire.planning.dials import Dials
from revwire.rewrite.mark import marked, warn_unlike
from revwire.rewrite.recording import Recording, fitting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from revwire.measure.budget import Budget
    from revwire.planning.plan import Plan
    from revwire.run.options import Fallback


def rewired(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: str | int | Budget | None = None,
    plan: Plan | None = None,
    compile: bool = False,  # noqa: A002 - as torch and Lightning name it
    overlap: bool = False,
    check: bool = True,
    fallback: Fallback = "error",
    **options: Any,
) -> tuple[nn.Module, Plan]:
    """Rewire a model in place; the arguments are those of `revwire.rewire`.

    Returns:
        The same model, and the plan that it now runs.

    Raises:
        RewireError: as `revwire.rewire`.
    """
    recording, chosen = chosen_for(
        model, example_inputs, budget=budget, plan=plan, overlap=overlap, **options
    )
    ways: dict[str, Any] = {"compiled": compile, "overlap": overlap, "fallback": fallback, "check": check}
    return recording.rewire(model, chosen, **ways), chosen


def chosen_for(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: str | int | Budget | None = None,
    plan: Plan | None = None,
    overlap: bool = False,
    **options: Any,
) -> tuple[Recording, Plan]:
    """A recorded run of a model, and the plan that the arguments of `revwire.rewire` come to.

    Raises:
        RewireError: as `revwire.rewire`.
    """
    dials, choice = split_dials(options)
    if (plan is not None) + (budget is not None) + (dials != Dials()) > 1:
        raise RewireError(
            "chunks, keep, anchor and transitions are part of a plan, and chosen by a budget: pass one"
        )
    saved = marked(model) if plan is None else None
    recording = Recording.of(model, example_inputs, **settled(choice, plan or saved))
    if budget is not None:
        dials = dials_within(model, example_inputs, budget, recording, overlap=overlap)
    if plan is not None:
        chosen = fitting(plan, recording.fresh, recording.found)
    elif saved is not None and _says_all(saved, recording, choice) and budget is None and dials == Dials():
        chosen = _as_saved(saved, recording)
    else:
        chosen = dials.turned(recording.fresh, recording.found)
    if saved is not None:
        warn_unlike(saved, chosen, "config.json says that the weights", stacklevel=4)
    return recording, chosen


def _says_all(saved: Plan, recording: Recording, choice: Mapping[str, Any]) -> bool:
    """Whether a plan in a config is of this very model, and nothing else was asked for."""
    return saved.model == recording.fresh.model and all(value is None for value in choice.values())


def _as_saved(saved: Plan, recording: Recording) -> Plan:
    try:
        return fitting(saved, recording.fresh, recording.found)
    except RewireError as error:
        raise RewireError(
            f"{error}. The plan is that of config.json, by which this model was rewired when it was saved; pass "
            "coupling= to plan it afresh"
        ) from error


def settled(choice: Mapping[str, Any], like: Plan | None) -> dict[str, Any]:
    """The arguments of `Recording.of`; where none was given, those of a plan made earlier."""
    usual = (
        {"coupling": like.coupling, "exact": like.exact} if like else {"coupling": "re2tal", "exact": False}
    )
    return {**usual, **{name: value for name, value in choice.items() if value is not None}}


def split_dials(options: Mapping[str, Any]) -> tuple[Dials, dict[str, Any]]:
    """The dials among the arguments of `revwire.rewire`, and what is left of them for `Recording.of`."""
    names = {field.name for field in fields(Dials)}
    dials = Dials(**{name: value for name, value in options.items() if name in names})
    return dials, {name: value for name, value in options.items() if name not in names}
