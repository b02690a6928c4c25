"""A training step on fake tensors: forward, backward and optimizer run as they would, and compute nothing."""

from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from revwire._torch import FakeTensorMode, quiet_fake_tensors
from revwire.errors import RevwireError
from revwire.measure.step import LiveBytes
from revwire.measure.strategies import treated
from revwire.pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from revwire.measure.step import Loss
    from revwire.measure.strategies import Strategy


@dataclass(frozen=True)
class Figures:
    """Bytes of one training step; the fields are those of `revwire.measure.estimate.Estimate`."""

    peak: int
    model: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int
    where: str
    alive: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Optimization:
    """What one optimizer step takes, in bytes.

    Attributes:
        state: The optimizer's state, which stays.
        extra: The most that is alive in a step beside parameters, gradients and state.
    """

    state: int
    extra: int


@dataclass(frozen=True)
class TrainingStep:
    """A training step to come: what goes into it, beside the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None
    loss_fn: Loss
    autocast: torch.dtype | None
    device: torch.device
    accumulate: bool = False

    def prepared(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        """A copy of the model on the meta device, made ready for one way of doing the step."""
        return treated(*self.on_meta(model), strategy)

    def on_meta(self, model: nn.Module) -> tuple[nn.Module, Any]:
        """A copy of the model on the meta device, and what it is called with."""
        move = partial(empty_like, device=torch.device("meta"))
        args, kwargs = tree_map(move, (self.args, self.kwargs))
        return moved(model, move), kwargs or args

    @property
    def tensors(self) -> list[Tensor]:
        """What the model is called with, but for numbers and the like."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def resized(self, dim: int, size: int) -> TrainingStep:
        """The same with another size of a dimension of the first input; the batch is that of all inputs."""
        before, own = self.varied(dim), self.tensors[0]

        def other(leaf: Any) -> Any:
            alike = leaf is own or (
                dim == 0 and isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == before
            )
            if not alike:
                return leaf
            shape = [size if i == dim else n for i, n in enumerate(leaf.shape)]
            return torch.empty(shape, dtype=leaf.dtype, device="meta")

        args, kwargs = tree_map(other, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def varied(self, dim: int) -> int:
        """The size that `resized` varies.

        Raises:
            RevwireError: the first input has no such dimension, or there is none.
        """
        tensors = self.tensors
        if not tensors or not 0 <= dim < tensors[0].ndim:
            found = f"a tensor of {tensors[0].ndim} dimensions" if tensors else "no tensor"
            raise RevwireError(f"cannot vary dimension {dim} of the first input, which is {found}")
        return tensors[0].shape[dim]

    def optimized(self, model: nn.Module) -> Optimization:
        """What the optimizer holds and takes; the same for every way of coming by the gradients."""
        if self.optimizer is None or not trainable(model):
            return Optimization(0, 0)
        shapes = [parameter.detach() for parameter in trainable(model)]
        with quiet_fake_tensors(), FakeTensorMode(), LiveBytes() as meter:
            stand_ins = [nn.Parameter(empty_like(shape, device=self.device)) for shape in shapes]
            for parameter in stand_ins:
                parameter.grad = torch.empty_like(parameter)
            optimizer, before = self.optimizer(stand_ins), meter.live
            optimizer.step()
            state = meter.live - before
            meter.reset_peak()
            optimizer.step()
        return Optimization(state, meter.peak - before - state)

    def run(self, prepared: nn.Module, optimization: Optimization) -> Figures:
        """The figures of one model made ready, and optimized like that."""
        with quiet_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True), _Meter() as meter:
            stand_in = partial(empty_like, device=self.device)
            model = moved(prepared, stand_in)
            of_model = meter.live
            with meter.phase("inputs"):
                args, kwargs = tree_map(stand_in, (self.args, self.kwargs))
            of_inputs = meter.live - of_model
            gradients = sum(p.nbytes for p in trainable(model))
            if self.accumulate:
                for parameter in trainable(model):
                    parameter.grad = torch.empty_like(parameter)
            meter.watch(model)
            meter.begin(optimization.state)
            with _paths(meter, model):
                with (
                    meter.phase("forward"),
                    torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
                ):
                    loss = self.loss_fn(model(*args, **kwargs))
                with meter.phase("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                with meter.phase("optimizer step"):
                    meter.passing(optimization.extra)
            alive = tuple(meter.alive.most_common())
        return Figures(
            meter.peak,
            of_model,
            gradients,
            optimization.state,
            of_inputs,
            meter.activations,
            meter.where,
            alive,
        )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer would be given."""
    return [p for p in model.parameters() if p.requires_grad]


class _Meter(LiveBytes):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Live bytes, and where they are made; from `begin` on, the peak's place too."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self.alive: Counter[str] = Counter()
        self.where = ""
        self.path: list[str] = []
        self._last = ""
        self._phase = "model"
        self._labels: dict[int, str] = {}
        self._parameters: list[nn.Parameter] = []
        self._gradients = 0
        self._base: int | None = None
        self._state = 0
        self._shown = 0

    def watch(self, model: nn.Module) -> None:
        """Tell gradients from temporaries: those of this model's parameters, where they are not there already."""
        self._parameters = trainable(model)
        arriving = [p for p in self._parameters if p.grad is None]

        def arrived(parameter: Tensor) -> None:
            self._gradients += parameter.nbytes

        for parameter in arriving:
            parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def begin(self, optimizer_state: int) -> None:
        """From here on the peak is looked for; what is alive now, and the optimizer's state, is no activation."""
        self._state = optimizer_state
        self._live += optimizer_state
        self._base, self._gradients = self.live, 0
        self.reset_peak()

    def passing(self, nbytes: int) -> None:
        """Count what comes and goes and was measured elsewhere."""
        if (moment := self.live + nbytes) > self.peak:
            self.peak, self.where, self.alive = moment, self._place(), self._told()
            self.alive[self._phase] += nbytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made in the block is called after `name`, where no module makes it."""
        self._phase, self._last, before = name, "", self._phase
        yield
        self._phase = before

    def entered(self, path: str) -> None:
        """A module begins to run."""
        self.path.append(path)
        self._last = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.peak
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._base is None:
            return out
        self.activations = max(self.activations, self._live - self._base - self._gradients)
        if self.peak > before:
            self.where = self._place()
            # telling all that is alive takes time: only for peaks that are really others
            if self.peak > 1.01 * self._shown:
                self._shown = self.peak
                self.alive = self._told()
        return out

    def _place(self) -> str:
        if self.path:
            return f"{self._phase} of {self.path[-1]}"
        return (
            f"{self._phase}, after {self._last} ran again"
            if self._last and self._phase == "backward"
            else self._phase
        )

    def _count(self, storage: torch.UntypedStorage) -> None:
        super()._count(storage)
        if self.path:
            self._labels[id(storage)] = re.sub(r"\b\d+\b", "*", self.path[-1])
        else:
            self._labels[id(storage)] = self._phase

    def _told(self) -> Counter[str]:
        gradients = {id(p.grad.untyped_storage()) for p in self._parameters if p.grad is not None}
        told = Counter({"optimizer state": self._state} if self._state else {})
        for key, counted in self._counted.items():
            told["gradients" if key in gradients else self._labels[key]] += counted.nbytes
        return told


@contextmanager
def _paths(meter: _Meter, model: nn.Module) -> Iterator[None]:
    """The meter knows which module runs."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            meter.entered(names[id(module)] or "(model)")

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            meter.path.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        # a second run that stops early leaves its modules by an exception
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield


def moved(model: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with other tensors for its parameters and buffers; theirs are not copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = move(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, tensor.requires_grad)
        memo[id(tensor)] = moved
    return copy.deepcopy(model, memo)


def empty_like(leaf: Any, device: torch.device) -> Any:
    """A tensor of the same shape, strides and dtype, with no values; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return made.requires_grad_(leaf.requires_grad)
