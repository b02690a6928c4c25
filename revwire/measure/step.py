"""Bytes and seconds of one training step.

Two figures describe what a step needs beside the model: *held*, the bytes that live between forward and
backward, and *peak*, the most bytes that live at once during forward and backward. Neither counts what exists
before the step begins (parameters, buffers, inputs, targets), nor the `.grad` of the parameters, which are
allocated before it; the gradient of one parameter on its way into its `.grad` is a temporary of the step and
is counted.

On CUDA the figures are the allocator's own. Elsewhere `LiveBytes` counts the storages of the tensors that
operators return. It sees tensors wherever they are kept: by autograd, on a custom Function's `ctx`, in a
closure, in a cache. It does not see scratch memory inside one kernel, nor the few kilobytes of a saved random
state, which no operator makes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revwire.errors import RevwireError
from revwire.measure.live_bytes import LiveBytes
from revwire.pytree import tree_leaves

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class StepMemory:
    """What one training step needed beside the model, its gradients and its inputs.

    Attributes:
        held: Bytes alive between forward and backward, when only the loss is kept.
        peak: Most bytes alive at once during forward and backward.
        method: How they were counted: `"live tensors"` or `"CUDA allocator"`.
    """

    held: int
    peak: int
    method: str


def measure_step(
    model: nn.Module, inputs: Any, loss_fn: Loss | None = None, *, autocast: torch.dtype | None = None
) -> StepMemory:
    """Run one training step and count its bytes.

    It is one ordinary forward and backward: random state and BatchNorm statistics move as in any other step.
    Gradients go to zeros set up for the purpose; the `.grad` of every parameter is put back as it was.
    Python's cyclic garbage collector rests meanwhile, so that what is kept alive by a reference cycle always
    counts.

    The first step of a model may also fill caches that stay (cuBLAS workspaces, rope tables), and would count
    them: run one step before.

    Args:
        model: The model, in the mode (train or eval) and on the device to measure.
        inputs: What the model is called with: one tensor, a sequence of positional or a mapping of keyword
            arguments.
        loss_fn: From the model's output to a scalar; the mean square of all outputs if not given.
        autocast: Run the forward under autocast to this dtype.

    Raises:
        RevwireError: The model's parameters lie on several devices, or the loss does not depend on them.
    """
    device = _device(model)
    meter = _cuda_bytes(device) if device.type == "cuda" else _live_bytes()
    with _spare_gradients(model), _no_collector(), meter as read:
        loss = _forward(model, inputs, loss_fn, autocast)
        held, _ = read()
        loss.backward()  # type: ignore[no-untyped-call]
        _, peak = read()
    return StepMemory(held, peak, "CUDA allocator" if device.type == "cuda" else "live tensors")


def training_step(
    model: nn.Module, inputs: Any, loss_fn: Loss | None = None, *, autocast: torch.dtype | None = None
) -> Callable[[], None]:
    """A step to time: drop the gradients, forward, backward. Arguments as for `measure_step`."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        _forward(model, inputs, loss_fn, autocast).backward()  # type: ignore[no-untyped-call]

    return step


def mean_square(output: Any) -> Tensor:
    """The mean square of every floating-point tensor in `output`, summed: a loss that any model has.

    Raises:
        RevwireError: `output` holds no floating-point tensor.
    """
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise RevwireError(
            f"the output ({type(output).__name__}) holds no floating-point tensor: pass loss_fn"
        )
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def _forward(model: nn.Module, inputs: Any, loss_fn: Loss | None, autocast: torch.dtype | None) -> Tensor:
    # nothing but the loss may outlive this frame: an output kept by a local would count as held
    with torch.autocast(_device(model).type, dtype=autocast, enabled=autocast is not None):
        loss = (loss_fn or mean_square)(_call(model, inputs))
    if not loss.requires_grad:
        raise RevwireError(
            "the loss does not depend on anything that needs a gradient: check requires_grad and loss_fn"
        )
    return loss


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def _device(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise RevwireError(
            f"all parameters of {type(model).__name__} have to be on one device, found: {found}"
        )
    return devices.pop()


@contextmanager
def _spare_gradients(model: nn.Module) -> Iterator[None]:
    """Zeros as `.grad` of all trainable parameters, for backward to add to in place; then the old ones."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter, _ in kept:
            parameter.grad = torch.zeros_like(parameter)
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _live_bytes() -> Iterator[Callable[[], tuple[int, int]]]:
    with LiveBytes() as meter:
        yield lambda: (meter.live, meter.peak)


@contextmanager
def _cuda_bytes(device: torch.device) -> Iterator[Callable[[], tuple[int, int]]]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: (
        torch.cuda.memory_allocated(device) - before,
        torch.cuda.max_memory_allocated(device) - before,
    )
