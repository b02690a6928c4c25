"""From a recorded run to a fresh plan: its chains, and warnings where the coupling will not do well on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from revwire.planning.chains import make_plan
from revwire.planning.dials import Globs, globs_of
from revwire.run.exact import Exact, Grid

if TYPE_CHECKING:
    from revwire.find.probe import Probe
    from revwire.planning.plan import Plan
    from revwire.run.coupling import Coupling


FLOAT32_ROUNDING = 2.0**-24


MOST_NOISE = 1e-3


"""The relative gradient error that a plan warns of. Measured: noise^steps * 2^-24 predicts it within a factor of two
(momentum and BDIA at 1/2, 12 steps: 2.4e-4 predicted, 2.8e-4 and 3.2e-4 found)."""


def choose_plan(
    found: Probe, coupling: Coupling, exact: Exact = False, include: Globs = None, exclude: Globs = None
) -> Plan:
    """The chains to rewire of a recorded run."""
    blocks = coupling.keeps_function
    chosen = make_plan(found, coupling.spec, globs_of(include), globs_of(exclude) or (), blocks=blocks)
    bits = exact.bits if isinstance(exact, Grid) else exact
    return replace(chosen, exact=bits, warnings=_warnings(chosen, coupling, exact))


def _warnings(chosen: Plan, coupling: Coupling, exact: Exact) -> tuple[str, ...]:
    """What the coupling will not do well on these chains."""
    if not coupling.a:
        return (f"{coupling.spec} is the network as it was: not reversible, so it saves no memory",)
    if exact is not False or coupling.noise == 1:
        return ()
    told = []
    for chain in chosen.chains:
        steps = len(chain.steps)
        error = coupling.error_after(steps, FLOAT32_ROUNDING)
        if error > MOST_NOISE:
            told.append(
                f"{chain.name}: the inverse of {coupling.spec} amplifies rounding errors {coupling.noise:.3g} times a "
                f"step; over {steps} steps gradients of float32 streams would be wrong by about {error:.0e} of "
                f"their size; use exact=True, or at most {_carried(coupling)} steps a chain (exclude=)"
            )
    return tuple(told)


def _carried(coupling: Coupling) -> int:
    """How many steps of a chain float32 carries."""
    return int(math.log(MOST_NOISE / FLOAT32_ROUNDING) / math.log(coupling.noise))


def nothing_to_rewire(empty: Plan) -> str:
    """The words for a plan without chains: the first reasons it gives."""
    reasons = "; ".join(f"{s.module or '(model)'}: {s.reason}" for s in empty.skipped[:3])
    more = (
        f" (and {len(empty.skipped) - 3} more: print(revwire.plan(model)))" if len(empty.skipped) > 3 else ""
    )
    return (
        f"{empty.model} has no two residual blocks in a row on one trunk, so nothing of it can be made reversible"
        + (f": {reasons}{more}" if reasons else "; it has no residual additions")
    )
