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
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revwire._torch import FakeTensor, TorchDispatchMode, active_fake_mode, is_traceable_wrapper_subclass
from revwire.errors import RevwireError
from revwire.pytree import tree_leaves

Loss = Callable[[Any], Tensor]


class _Counted(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a counted storage, with its key and the bytes it was counted with."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Counts the bytes of the tensors that operators make inside the meter, for as long as they live.

    A storage counts once however many views look at it, from the operator that first returns it until nothing
    refers to it any more. A storage that exists before the meter is entered is never counted, nor are views
    of it. A storage that was resized counts with its new size from the next operator that touches it, or the
    next reading of `live`. Made inside `FakeTensorMode`, the meter counts the storages that the real tensors of
    that mode would have, and none of another mode that is entered meanwhile. Sparse tensors are not counted.

    Attributes:
        peak: Highest number of live bytes after any operator since the meter was made, or since `reset_peak`.

    Example:
        >>> x = torch.ones(256, requires_grad=True)  # 1 KiB, made before: not counted
        >>> with LiveBytes() as meter:
        ...     loss = (2 * x).square().sum()
        >>> meter.live, meter.peak  # 2 * x is saved for backward, and the loss; its square came and went
        (1028, 2052)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._mode = active_fake_mode()
        self._counted: dict[int, _Counted] = {}

    @property
    def live(self) -> int:
        """Bytes counted and alive now; also after the meter is left."""
        for counted in list(self._counted.values()):
            if (storage := counted()) is not None:
                self._recount(counted, storage)
        return self._live

    def counted(self) -> list[Callable[[], torch.UntypedStorage | None]]:
        """Weak references to the storages that are counted now."""
        return list(self._counted.values())

    def reset_peak(self) -> None:
        """Let `peak` start again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two in three operations on fake tensors ask for nothing else
        out = func(*args, **(kwargs or {}))
        # a rewired forward that is called in a new way is traced then and there, in a fake mode of its own
        if func.namespace == "prim" or (self._mode is not None and active_fake_mode() is not self._mode):
            return out
        # torch.tensor(...) hands its fresh tensor to this one operator: it has an argument, yet nothing older
        fresh = func is torch.ops.aten.lift_fresh.default
        given = set() if fresh else {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            counted = self._counted.get(id(storage))
            if counted is not None:
                self._recount(counted, storage)
            elif id(storage) not in given:
                self._count(storage)
        self.peak = max(self.peak, self._live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        counted = _Counted(storage, self._forget)
        # the Python object of a storage lives exactly as long as the storage, so its id is a sound key
        counted.key = id(storage)
        counted.nbytes = storage.nbytes()
        self._counted[counted.key] = counted
        self._live += counted.nbytes

    def _recount(self, counted: _Counted, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._live += nbytes - counted.nbytes
        counted.nbytes = nbytes

    def _forget(self, counted: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(counted, _Counted)
        self._live -= counted.nbytes
        del self._counted[counted.key]


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in `tree`; those inside for a tensor subclass that wraps others."""
    for leaf in tree_leaves(tree):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _storages([getattr(leaf, name) for name in names])
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


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


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median of the round-by-round ratios to `other`: a slow moment of the machine slows both alike."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def training_step(
    model: nn.Module, inputs: Any, loss_fn: Loss | None = None, *, autocast: torch.dtype | None = None
) -> Callable[[], None]:
    """A step to time: drop the gradients, forward, backward. Arguments as for `measure_step`."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        _forward(model, inputs, loss_fn, autocast).backward()  # type: ignore[no-untyped-call]

    return step


def time_alternating(
    steps: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    *,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time several ways of doing a step, taking turns, so that a slow moment of the machine favours none.

    Every round runs each step once and begins with another one. Garbage is collected before each, outside the
    clock; on CUDA the clock waits for the device.

    Args:
        steps: What to time, by name.
        rounds: How many timed runs each step gets, at least 1.
        warmup: How many runs each gets before, not timed.
        progress: Called with the name of each step before it runs, warm-up included.

    Raises:
        RevwireError: There is no step, or no round.
    """
    if not steps or rounds < 1:
        raise RevwireError(f"timing needs at least one step and one round, found {len(steps)} and {rounds}")
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            progress(name)
            elapsed = _seconds(steps[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


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


def _seconds(step: Callable[[], object]) -> float:
    gc.collect()
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    # asking whether CUDA is in use, rather than available, keeps a CPU measurement from starting a CUDA
    # context
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
