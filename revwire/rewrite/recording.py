"""One recorded run of a model, and rewiring the model from it, once or several times with other dials."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from revwire.errors import RewireError
from revwire.find.probe import Probe, probe
from revwire.libraries.inputs import call_arguments
from revwire.planning.choose import choose_plan, nothing_to_rewire
from revwire.planning.dials import Globs, check_dials
from revwire.rewrite import mark
from revwire.rewrite.swap import apply_plan
from revwire.rewrite.wired import is_wired
from revwire.run.coupling import Coupling, coupling_of
from revwire.run.exact import Grid, exact_of
from revwire.run.options import Fallback, Options

if TYPE_CHECKING:
    from torch import nn

    from revwire.planning.plan import Chain, Plan


@dataclass(frozen=True)
class Recording:
    """One recorded run of a model, from which the model, or copies of it, are rewired with any dials.

    Attributes:
        found: The run.
        fresh: The chains chosen from it, no dial turned.
        options: How their steps will run.
    """

    found: Probe
    fresh: Plan
    options: Options

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        coupling: str | Coupling = "re2tal",
        exact: bool | int | Grid = False,
        include: Globs = None,
        exclude: Globs = None,
    ) -> Recording:
        """Run `model` once on fake tensors, and choose; the arguments are those of `revwire.rewire`.

        Raises:
            RewireError: the model is rewired already, does not run on the inputs, or the inputs are not known.
        """
        if any(map(is_wired, model.modules())):
            raise RewireError(f"{type(model).__name__} is rewired already; call revwire.unwire(model) first")
        kind = coupling_of(coupling)
        streams = exact_of(exact, kind)
        args, kwargs = call_arguments(model, example_inputs)
        found = probe(model, args, kwargs)
        fresh = choose_plan(found, kind, streams, include, exclude)
        return cls(found, fresh, Options(kind, exact=streams))

    def rewire(
        self,
        model: nn.Module,
        chosen: Plan,
        *,
        compiled: bool = False,
        overlap: bool = False,
        check: bool = True,
        fallback: Fallback = "error",
    ) -> nn.Module:
        """Rewire the model that was recorded, or a copy of it as it was then; returns it.

        Args:
            model: That one.
            chosen: What to rewire of it.
            compiled: Have torch.compile run the branches.
            overlap: Have second runs start beside the gradients of the step after theirs.
            check: Have the numbers of second runs compared.
            fallback: What a call does that cannot be rewired.

        Raises:
            RewireError: there is nothing to rewire, or a module of it cannot be.
        """
        if not chosen.chains:
            raise RewireError(nothing_to_rewire(chosen))
        if fallback not in get_args(Fallback):
            raise RewireError(f"fallback is one of {', '.join(get_args(Fallback))}, not {fallback!r}")
        ways: dict[str, Any] = {"compile": compiled, "overlap": overlap, "check": check, "fallback": fallback}
        options = replace(self.options, **ways)
        apply_plan(model, chosen, self.found, options)
        mark.put(model)
        return model


def fitting(wanted: Plan, fresh: Plan, found: Probe) -> Plan:
    """The wanted plan, if this model has its residuals.

    Raises:
        RewireError: it has not; the message names the first step that is missing.
    """
    for step in wanted.steps:
        if found.residual(step) is None:
            raise RewireError(
                f"the plan does not fit {fresh.model}: it has no residual {step.name}; "
                "plan again with revwire.plan(model)"
            )
    for chain in wanted.chains:
        _check_trained(chain, fresh, found)
    check_dials(wanted, found)
    if wanted.coupling != fresh.coupling:
        raise RewireError(
            f"the plan was made for coupling {wanted.coupling!r}, not {fresh.coupling!r}; "
            f"pass coupling={wanted.coupling!r}"
        )
    if (type(wanted.exact), wanted.exact) != (
        type(fresh.exact),
        fresh.exact,
    ):  # True == 1, but is another grid
        raise RewireError(
            f"the plan was made for exact={wanted.exact}, not {fresh.exact}; pass exact={wanted.exact}"
        )
    return wanted


def _check_trained(chain: Chain, fresh: Plan, found: Probe) -> None:
    """Prove again what a plan that was made elsewhere takes for granted of training.

    Raises:
        RewireError: a step is another one in training, or its trunk is.
    """
    residuals = [residual for step in chain.steps if (residual := found.residual(step)) is not None]
    for step, residual in zip(chain.steps, residuals, strict=True):
        if (why := found.training.refuses(residual)) is not None:
            raise RewireError(f"the plan does not fit {fresh.model}: {step.name}: {why}; plan again")
    for before, after in pairwise(residuals):
        if found.training.parts(before, after):
            raise RewireError(
                f"the plan does not fit {fresh.model}: in training the code between {before.line} and {after.line} "
                "changes the trunk; plan again"
            )
