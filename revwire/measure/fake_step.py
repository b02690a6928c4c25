"""A training step on fake tensors: forward, backward and optimizer run as they would, and compute nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revwire._torch import FakeTensorMode, fake_results_forgotten, quiet_fake_tensors
from revwire.errors import RevwireError
from revwire.libraries.inputs import call_arguments
from revwire.measure.live_bytes import LiveBytes
from revwire.measure.meter import Meter, paths_known, trainable
from revwire.measure.step import Loss, mean_square
from revwire.pytree import tree_leaves, tree_map


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

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        optimizer: Optimizer = "adamw",
        loss_fn: Loss | None = None,
        autocast: torch.dtype | None = None,
        accumulate: bool = False,
        device: str | torch.device | None = None,
    ) -> TrainingStep:
        """A step of `model`; the arguments are those of `revwire.estimate`.

        Raises:
            RevwireError: a name makes no sense, the inputs are not known, or there is no such device.
        """
        args, kwargs = call_arguments(model, example_inputs)
        place = _device_of(model) if device is None else _device(device)
        return cls(args, kwargs, _optimizer(optimizer), loss_fn or mean_square, autocast, place, accumulate)

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
        with fake_results_forgotten(), quiet_fake_tensors(), FakeTensorMode(), LiveBytes() as meter:
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
        with (
            fake_results_forgotten(),
            quiet_fake_tensors(),
            FakeTensorMode(allow_non_fake_inputs=True),
            Meter() as meter,
        ):
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
            with paths_known(meter, model):
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


Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None


_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


def _device_of(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _device(named: str | torch.device) -> torch.device:
    """Fake tensors of a device compute nothing, but torch asks the device itself about its streams."""
    try:
        place = torch.device(named)
        there = torch.get_device_module(place).is_available()
    except RuntimeError as error:
        raise RevwireError(f"{named!r} is no device that torch knows ({error}); estimate for cpu") from None
    if not there:
        raise RevwireError(f"there is no {place.type} device here; estimate for cpu")
    return place


def _optimizer(named: Optimizer) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None:
    if not isinstance(named, str):
        return named
    if named.lower() not in _OPTIMIZERS:
        raise RevwireError(
            f"{named!r} is not one of {', '.join(_OPTIMIZERS)}; pass a function from parameters to one"
        )
    return _OPTIMIZERS[named.lower()]
