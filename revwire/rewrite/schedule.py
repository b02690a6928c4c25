"""Dr2Net's dynamic finetuning: from the pretrained network to a well-conditioned reversible one, while training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from revwire.errors import RewireError
from revwire.rewrite import mark
from revwire.rewrite.wired import PROGRAM, options_of, plan_of
from revwire.run.coupling import Dr2Net

if TYPE_CHECKING:
    from torch import nn

    from revwire.run.coupling import Coupling


class Dr2NetSchedule:
    """Moves a model rewired with `Dr2Net` from the `start` coefficients to the `end` ones over `steps` optimizer steps.

    beta grows by the same factor at every step, and alpha follows on the straight line between both ends, so that
    alpha + beta = 1 holds on the way where it holds at the ends: streams then neither grow nor shrink. In an exact
    model beta takes the powers of two on its way. Call `step()` after `optimizer.step()`, as with a learning-rate
    scheduler; a forward in flight keeps the coefficients that it started with.

    The dynamic finetuning of Dr2Net (Zhao et al., CVPR 2024, arXiv 2401.04105). The paper's own values and pace could
    not be had; the default end was chosen by `benchmarks/finetune.py` (five seeds), where (0, 1) cost accuracy.

    Args:
        model: A model rewired with `coupling="dr2net"` (best with `exact=True`, as a small beta amplifies rounding).
        steps: How many calls of `step()` until the end is reached.
        start: (alpha, beta) before the first step.
        end: (alpha, beta) from step number `steps` on.

    Raises:
        RewireError: the model is not rewired with Dr2Net, or the schedule's ends or length make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        start: tuple[float, float] = (0.875, 0.125),
        end: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        if steps < 1:
            raise RewireError(f"a schedule has at least one step, not {steps}")
        if not (start[1] > 0 and end[1] > 0):
            raise RewireError(f"beta must be larger than 0 at both ends, not {start[1]} and {end[1]}")
        self._model, self._exact = model, False
        self._set(steps, start, end, 0)

    @property
    def coupling(self) -> Dr2Net:
        """The coefficients that the next forward runs with."""
        progress = min(1.0, self._step / self._steps)
        (alpha, beta), (last_alpha, last_beta) = self._start, self._end
        now = math.exp((1 - progress) * math.log(beta) + progress * math.log(last_beta))
        now = last_beta if progress == 1 else beta if not progress else now
        if self._exact:
            now = 2.0 ** round(math.log2(now))
        way = 1.0 if last_beta == beta else (now - beta) / (last_beta - beta)
        way = progress if last_beta == beta else way
        return Dr2Net(alpha + way * (last_alpha - alpha), now)

    def step(self) -> None:
        """Move one step on; past the end, stay there."""
        self._step += 1
        set_coupling(self._model, self.coupling)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, as plain numbers."""
        return {"steps": self._steps, "start": self._start, "end": self._end, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken; the model runs with the coefficients of then."""
        self._set(int(state["steps"]), tuple(state["start"]), tuple(state["end"]), int(state["step"]))

    def _set(self, steps: int, start: tuple[float, ...], end: tuple[float, ...], step: int) -> None:
        options = options_of(self._model)
        if options is None or not isinstance(options.coupling, Dr2Net):
            found = "not rewired" if options is None else f"rewired with {options.coupling.name}"
            raise RewireError(
                f"{type(self._model).__name__} is {found}; call revwire.rewire(model, coupling='dr2net') first"
            )
        self._exact = options.exact is not False
        self._steps, self._start, self._end, self._step = steps, start, end, step
        set_coupling(self._model, self.coupling)


def set_coupling(model: nn.Module, coupling: Coupling) -> None:
    """Have the next forward of a rewired model run another recurrence; one in flight keeps its own."""
    for module in model.modules():
        if (program := module.__dict__.get(PROGRAM)) is not None:
            program.options = replace(program.options, coupling=coupling)
    for module in model.modules():
        if plan_of(module) is not None:  # it may be held by another
            mark.put(module)
