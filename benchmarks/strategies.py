"""The ways of doing a training step that are measured: those that revwire estimates, and one that moves tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu

from revwire.memory.strategies import STRATEGIES as ESTIMATED
from revwire.memory.strategies import treated

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


def worth_measuring(device: str) -> list[str]:
    """The strategies that say something on a kind of device: a CPU has no other memory to move tensors to."""
    return [name for name in STRATEGIES if name != "offload" or not device.startswith("cpu")]


STRATEGIES: dict[str, Strategy] = {
    **{name: partial(treated, strategy=name) for name in ESTIMATED},
    "offload": offloaded,
}
