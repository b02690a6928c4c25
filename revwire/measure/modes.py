"""What `verify` compares of both modes: every planned step runs rewired in each, and they are one function.

Training is compared with evaluation with all random rates at zero and batch statistics as in evaluation. Where the
network as it was is one function then, in float64, the rewired one has to be one too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire._torch import AnyBatchNorm
from revwire.errors import RewireError
from revwire.libraries.rates import Undropped, stop_dropping
from revwire.measure.report import Check
from revwire.measure.specimen import cast, difference, floats, seed
from revwire.measure.watching import around_steps
from revwire.planning.copies import copied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from revwire.planning.plan import Plan
    from revwire.run.branch import Branch
    from revwire.run.options import Options
    from revwire.run.streams import Streams

STEPS = "steps not rewired"
BOUND = 1e-10
_ONE_FUNCTION = 1e-6
_ROUNDINGS = 10


def both_modes(
    original: nn.Module,
    wired: Callable[..., nn.Module],
    plan: Plan,
    options: Options,
    inputs: tuple[Any, Any],
) -> Iterator[Check]:
    """Whether each step runs rewired in each mode, and whether both are one function.

    Args:
        original: The network as it was.
        wired: Makes a rewired copy of it, with other options where it is given some.
        plan: What is rewired.
        options: How its steps run.
        inputs: What the model is called with, by place and by name.
    """
    args, kwargs = cast(inputs, torch.float64)
    wanted = [_output(copied(original), args, kwargs, training=training) for training in (False, True)]
    own = _apart(*wanted)
    found = []
    for training in (False, True):
        names = set[str]()
        failure = ""
        try:
            with around_steps(partial(_named, names)):
                found.append(_output(wired(fallback="error"), args, kwargs, training=training))
        except RewireError as error:
            failure = str(error)
        missing = [step.name for step in plan.steps if options.coupling.in_mode(training=training).a]
        missing = [name for name in dict.fromkeys(missing) if name not in names]
        where = failure or ", ".join(missing[:3])
        yield Check(f"{STEPS}, {_name(training)}", len(missing), 0, where)
    same = options.coupling.in_mode(training=False) == options.coupling.in_mode(training=True)
    if len(found) == 2 and same and own <= _ONE_FUNCTION:
        note = f"in float64, nothing dropped; the original's are {own:.1e} apart"
        yield Check("training and evaluation apart", _apart(*found), max(BOUND, _ROUNDINGS * own), note)


def _name(training: bool) -> str:
    return "train" if training else "eval"


def _output(model: nn.Module, args: Any, kwargs: Any, *, training: bool) -> list[torch.Tensor]:
    """What a model returns in one mode with nothing dropped; changes it."""
    model.to(torch.float64).train(training)
    stop_dropping(model)
    for module in model.modules():
        if isinstance(module, AnyBatchNorm):
            module.eval()
    seed(4)
    with torch.no_grad(), Undropped():
        return floats(model(*args, **kwargs))


def _apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """How far two outputs are apart, infinitely where training returns something else."""
    if len(one) != len(other):
        return float("inf")
    return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _named(names: set[str], step: Callable[[], Streams], _: Streams, branch: Branch) -> Streams:
    names.add(branch.name)
    return step()
