"""Choosing the dials so that a training step fits into given memory and loses as little time as it can.

Fastest first: steps that keep their graph cost no second run; anchored steps stop theirs before its last product; then
the transitions are run again; then branches are cut into slices. Steps of short trunks keep first: a late stage's
graph is small for the time that its second run would take.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from revwire.dials import Dials
from revwire.errors import RewireError
from revwire.memory.estimate import Optimizer, estimate, in_words, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from revwire.dials import Transitions
    from revwire.memory.measure import Loss
    from revwire.plan import Plan

_LOG = logging.getLogger("revwire")

_SETTINGS: tuple[tuple[Transitions, int], ...] = (
    ("keep", 1),
    ("checkpoint", 1),
    ("checkpoint", 2),
    ("checkpoint", 4),
    ("checkpoint", 8),
    ("checkpoint", 16),
)


@dataclass(frozen=True)
class Budget:
    """The memory a training step may take, and what else `revwire.estimate` needs to know of the step.

    Attributes:
        limit: Bytes, or a size such as `"12GiB"`; of all that the step needs, parameters and optimizer state included.
        optimizer: As for `revwire.estimate`.
        loss_fn: As for `revwire.estimate`.
        autocast: As for `revwire.estimate`.
        device: As for `revwire.estimate`.
    """

    limit: str | int
    optimizer: Optimizer = "adamw"
    loss_fn: Loss | None = None
    autocast: torch.dtype | None = None
    device: str | torch.device | None = None


def dials_within(
    model: nn.Module, example_inputs: Any, budget: str | int | Budget, plan: Plan, options: Mapping[str, Any]
) -> Dials:
    """The dials with which a step of `model` on these inputs fits.

    Args:
        model: The model as it was built.
        example_inputs: As for `revwire.rewire`; of the shapes of the step.
        budget: What it has to fit into.
        plan: What will be rewired.
        options: The other arguments of `revwire.rewire`.

    Raises:
        RewireError: nothing fits; the message says by how much.
    """
    wanted = budget if isinstance(budget, Budget) else Budget(budget)
    limit = size_of(wanted.limit)
    names = _in_order(plan)
    peaks: dict[Dials, int] = {}

    def peak(setting: tuple[Transitions, int], level: int) -> int:
        dials = _dials(names, setting, level)
        if dials not in peaks:
            row = estimate(
                model,
                example_inputs,
                strategies={"": {**options, **vars(dials)}},
                optimizer=wanted.optimizer,
                loss_fn=wanted.loss_fn,
                autocast=wanted.autocast,
                device=wanted.device,
            ).rows[0]
            if row.failure:
                raise RewireError(f"budget: the step cannot be estimated: {row.failure}")
            peaks[dials] = row.peak
        return peaks[dials]

    smallest, chosen = math.inf, None
    for setting in _SETTINGS:
        try:
            lowest = peak(setting, 0)
        except RewireError:
            if setting[1] == 1:
                raise
            break  # no branch can be cut
        smallest = min(smallest, lowest)
        if lowest <= limit:
            chosen = setting
            # slices cost less than second runs that go on to their last product
            if peak(setting, len(names)) <= limit:
                break
    if chosen is not None:
        level = _highest(partial(peak, chosen), 2 * len(names), limit)
        _LOG.info("%s", _told(limit, peak(chosen, level), chosen, level, len(names)))
        return _dials(names, chosen, level)
    raise RewireError(
        f"budget: the step needs at least {in_words(smallest)}, {in_words(smallest - limit)} more than "
        f"{in_words(limit)}; take a smaller batch (revwire.estimate(model, limit=...) says which fits), an "
        "optimizer with less state, or autocast"
    )


def _in_order(plan: Plan) -> tuple[str, ...]:
    """The steps, those of short trunks first, and each chain's from its beginning: kept so, nothing is kept twice."""
    chains = sorted(plan.chains, key=lambda chain: math.prod(chain.steps[0].trunk))
    return tuple(dict.fromkeys(step.name for chain in chains for step in chain.steps))


def _dials(names: tuple[str, ...], setting: tuple[Transitions, int], level: int) -> Dials:
    """The dials at a level: the first steps anchored, up to all of them; then the first of those kept, up to all."""
    transitions, chunks = setting
    kept = max(0, level - len(names))
    return Dials(chunks, names[:kept] or None, names[kept:level] or None, transitions)


def _highest(peak: Callable[[int], int], most: int, limit: int) -> int:
    """The highest level within the limit, given that level 0 is."""
    low, high, halve = 0, most, False
    if peak(high) <= limit:
        return high
    while high - low > 1:
        share = 0.5 if halve else (limit - peak(low)) / (peak(high) - peak(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if peak(guess) <= limit:
            low = guess
        else:
            high = guess
        halve = not halve
    return low


def _told(limit: int, peak: int, setting: tuple[Transitions, int], level: int, steps: int) -> str:
    kept = max(0, level - steps)
    said = [
        f"{kept} of {steps} steps keep their graph" if kept else "",
        f"{min(level, steps) - kept} keep an input",
    ]
    said += [f"branches run in {setting[1]} slices" if setting[1] > 1 else ""]
    said += ["transitions run again" if setting[0] == "checkpoint" else ""]
    sizes = f"{in_words(peak)} of {in_words(limit)}"
    return f"budget: the step takes {sizes}: {', '.join(filter(None, said))}"
