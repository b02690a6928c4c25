"""`verify`: the promises of a rewiring, measured on a copy of the model.

Each check compares the rewired copy with an independent run: the original forward, or ordinary autograd through the
same recurrence with nothing dropped and nothing run again. Branches that start at zero (BatchNorm gamma of zero, layer
scales of 1e-6) would make every comparison agree for the wrong reason, so the copies' are made non-zero first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire.errors import RewireError
from revwire.find.probe import probe
from revwire.libraries.inputs import call_arguments
from revwire.measure.checks import Runs
from revwire.measure.drift import drifts
from revwire.measure.modes import STEPS
from revwire.measure.report import Report
from revwire.measure.rewired import settled
from revwire.measure.specimen import cast, noisy_like, random_state_kept
from revwire.planning.choose import choose_plan, nothing_to_rewire
from revwire.planning.copies import copied
from revwire.planning.trial import make_branches_count
from revwire.rewrite.mark import marked
from revwire.rewrite.unwiring import unwire
from revwire.rewrite.wired import options_of, plan_of
from revwire.run.coupling import Coupling, coupling_of
from revwire.run.exact import Exact, Grid, exact_of
from revwire.run.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from revwire.planning.dials import Globs
    from revwire.planning.plan import Plan


def verify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Coupling | None = None,
    exact: bool | int | Grid | None = None,
    include: Globs = None,
    exclude: Globs = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure on copies of `model` that rewiring it is right: gradients, memory, decomposition, and the way back.

    Args:
        model: Any module, rewired (then its own plan and coupling are checked) or not; it is left as it is.
        example_inputs: What its forward takes, at a small batch, as for `revwire.plan`. Constant floating-point
            tensors (zeros made for their shape) are replaced by noise.
        coupling: The recurrence, for a model that is not rewired, as for `revwire.rewire`.
        exact: Whether its streams are in fixed point, for a model that is not rewired, as for `revwire.rewire`.
        include: Globs of module paths, as for `revwire.rewire`.
        exclude: Globs of module paths, as for `revwire.rewire`.
        progress: Called with the name of each check before it is measured.

    Raises:
        RewireError: the model cannot be rewired, or copied with its gradients, or its inputs are not known.
    """
    say = progress or (lambda _: None)
    say("plan")
    pristine, wanted, kind, streams = _pristine(model, coupling, exact)
    args, kwargs = call_arguments(pristine, example_inputs)
    args, kwargs = noisy_like(cast((args, kwargs), next((p.dtype for p in pristine.parameters()), None)))
    found = probe(pristine, args, kwargs)
    chosen = wanted or choose_plan(found, kind, streams, include, exclude)
    if not chosen.chains:
        raise RewireError(nothing_to_rewire(chosen))
    with random_state_kept():
        make_branches_count(pristine)
        run = Runs(pristine, found, chosen, Options(kind, exact=streams), args, kwargs)
        say("modes")
        checks = [run.state_dict(), *run.modes()]
        if any(check.figure and check.name.startswith(STEPS) for check in checks):
            # what does not run rewired would agree with the original for the wrong reason, or raise
            return Report(type(model).__name__, tuple(checks))
        for training in (False, True):
            mode = "train" if training else "eval"
            say(f"decomposition, {mode}")
            checks.append(run.decomposition(training=training))
            say(f"gradients, {mode}")
            checks.extend(run.gradients(training=training))
        say("memory")
        checks.append(run.memory())
        say("way back")
        checks.append(run.way_back())
        say("drift")
        drift = drifts(run.pristine, run.options, chosen, args, kwargs)
        checks.extend(run.reconstruction(drift))
    return Report(type(model).__name__, tuple(checks), drift)


def _pristine(
    model: nn.Module, coupling: str | Coupling | None, exact: bool | int | Grid | None
) -> tuple[nn.Module, Plan | None, Coupling, Exact]:
    """A copy of the model as it was before rewiring, with the plan, coupling and grid it had, if any."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise RewireError(
            f"{type(model).__name__} holds script modules; torch copies those without their parameters' gradients, and "
            "verify works on copies: verify the model as it is before torch.jit.script"
        )
    duplicate = copied(model)
    duplicate.zero_grad(set_to_none=True)
    if any(p.dtype in {torch.float16, torch.bfloat16} for p in duplicate.parameters()):
        duplicate.float()
    wanted, options = plan_of(model), options_of(model)
    if wanted is None or options is None:
        given = settled({"coupling": coupling, "exact": exact}, marked(model))
        kind = coupling_of(given["coupling"])
        return duplicate, None, kind, exact_of(given["exact"], kind)
    return unwire(duplicate), wanted, options.coupling, options.exact
