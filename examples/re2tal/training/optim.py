"""Optimizer, schedule and averaged weights."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from examples.re2tal.detector import Detector
    from examples.re2tal.sections import Optim


def optimizer_of(detector: Detector, settings: Optim) -> torch.optim.AdamW:
    """AdamW with rates of their own for backbone and head.

    Weights decay, biases, norms and scales do not; with `settings.decay_backbone` *all*, everything in the backbone
    decays. What is frozen is in no group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            in_backbone = name.startswith("backbone.")
            # layer scales are (channels, 1), but no weights of a layer
            decays = parameter.ndim > 1 and not name.endswith("bias") and "scales" not in name.split(".")
            decays = decays or (in_backbone and settings.decay_backbone == "all")
            key = (
                settings.backbone_lr if in_backbone else settings.lr,
                settings.weight_decay if decays else 0.0,
            )
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
    )


def schedule(
    optimizer: torch.optim.Optimizer, warmup: int, total: int, *, from_zero: bool = False, least: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that rise for `warmup` steps, and fall as a cosine until `total`.

    Args:
        optimizer: Whose rates.
        warmup: Steps.
        total: Steps that the cosine is laid out for.
        from_zero: The first step is at rate zero and the last of the warm-up at full rate, as in OpenTAD; else the
            first is at a part of it already and the one after the warm-up at full rate.
        least: The rate that the cosine ends at.
    """

    def factors(rate: float) -> Callable[[int], float]:
        floor = least / rate

        def factor(step: int) -> float:
            if step < warmup:
                return step / max(1, warmup - 1) if from_zero else (step + 1) / (warmup + 1)
            part = min(1.0, (step - warmup) / max(1, total - warmup))
            return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * part))

        return factor

    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factors(rate) for rate in rates])


class Average:
    """The exponential moving average of a model's weights and statistics.

    It copies tensors, not modules, so it holds for sharded models too.

    Args:
        model: The model to follow.
        decay: What is kept at each step, in the end.
        warmup: At first it follows faster, as an average of everything so far: a constant decay, which OpenTAD has,
            drags the random start along through a short training.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self._model, self._decay, self._warmup = model, decay, warmup
        self.tensors = {name: t.detach().clone() for name, t in _tensors(model)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after optimizer step `step`, counted from 1."""
        decay = min(self._decay, step / (step + 10)) if self._warmup else self._decay
        for name, tensor in _tensors(self._model):
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged tensors inside the block, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def whole(self) -> dict[str, Tensor]:
        """The averaged tensors, not sharded, on the CPU; every process has to call this."""
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in self.tensors.items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `whole` gave."""
        for name, own in self.tensors.items():
            given = tensors[name].to(own.device)
            if isinstance(own, DTensor):
                given = distribute_tensor(given, own.device_mesh, own.placements)
            own.copy_(given)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in _tensors(self._model):
            own = tensor.detach().clone()
            tensor.copy_(self.tensors[name])
            self.tensors[name].copy_(own)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a checkpoint: statistics of norms, the head's normalizer."""
    saved = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that are saved, by name."""
    yield from model.named_parameters()
    yield from saved_buffers(model)
