"""The ways of doing a training step that are measured: those that `revwire.estimate` knows, and some more.

`budget=checkpoint` and `budget=plain` rewire the model so that its step needs no more memory than a checkpointed or a
plain one. That memory is estimated for a step before which all parameters have their gradients, because the steps
measured here are of that kind: activations alone are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import typer
from torch import nn
from torch.autograd.graph import save_on_cpu

import revwire
from revwire.measure.strategies import STRATEGIES as ESTIMATED
from revwire.measure.strategies import treated

Strategy = Callable[[nn.Module, Any], nn.Module]


def offloaded(model: nn.Module, inputs: Any) -> nn.Module:  # noqa: ARG001 - all strategies take the same
    """Keep what backward needs in the memory of the host, with torch's `save_on_cpu`; on a CPU it copies."""
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=_on_gpu(model)):
            return forward(*args, **kwargs)

    model.forward = run  # type: ignore[method-assign]
    return model


def _on_gpu(model: nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())


def budgeted(model: nn.Module, inputs: Any, *, like: str, autocast: torch.dtype | None = None) -> nn.Module:
    """Rewire with the estimated memory of another way for a budget."""
    step: dict[str, Any] = {"optimizer": None, "autocast": autocast, "accumulate": True}
    limit = revwire.estimate(model, inputs, strategies=[like], **step).rows[0].peak
    return revwire.rewire(model, inputs, budget=revwire.Budget(limit, **step))


def graphed(
    model: nn.Module, inputs: Any, *, strategy: str, autocast: torch.dtype | None = None
) -> nn.Module:
    """Another way in CUDA graphs, one of its forward and one of its backward: Python's time is no part of a step.

    What the graphs need lies in a memory pool of their own all the time, and is not counted.
    """
    treated(model, inputs, strategy)
    with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, (inputs,), allow_unused_input=True)


def worth_measuring(device: str) -> list[str]:
    """The strategies that say something on a kind of device: a CPU has no other memory to move tensors to."""
    left_out = {"unchecked", *GRAPHED}
    if device.startswith("cpu"):
        left_out |= {"offload", "compiled", "overlap", "compiled, overlap"}
    return [name for name in STRATEGIES if name not in left_out]


def chosen(names: Iterable[str], autocast: torch.dtype | None) -> dict[str, Strategy]:
    """Some of `STRATEGIES`, for a step under autocast.

    Raises:
        typer.BadParameter: there is no such strategy.
    """
    named, takes_autocast = list(names), {*BUDGETED, *GRAPHED}
    if unknown := [name for name in named if name not in STRATEGIES]:
        message = f"{unknown[0]!r} is not one of {', '.join(STRATEGIES)}"
        raise typer.BadParameter(message, param_hint="--strategy")
    return {
        name: partial(STRATEGIES[name], autocast=autocast) if name in takes_autocast else STRATEGIES[name]
        for name in named
    }


BUDGETED: dict[str, Strategy] = {
    f"budget={like}": partial(budgeted, like=like) for like in ("checkpoint", "plain")
}
GRAPHED: dict[str, Strategy] = {
    f"{name}, graph": partial(graphed, strategy=name) for name in ("plain", "checkpoint", "rewired")
}
STRATEGIES: dict[str, Strategy] = {
    **{name: partial(treated, strategy=name) for name in ESTIMATED},
    **BUDGETED,
    **GRAPHED,
    "unchecked": partial(treated, strategy={"check": False}),
    "compiled": partial(treated, strategy={"compile": True}),
    "overlap": partial(treated, strategy={"overlap": True}),
    "compiled, overlap": partial(treated, strategy={"compile": True, "overlap": True}),
    "offload": offloaded,
}
