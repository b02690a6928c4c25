"""Optimizer, schedule and averaged weights."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from examples.re2tal.config import Optim
    from examples.re2tal.detector import Detector


def optimizer_of(detector: Detector, settings: Optim) -> torch.optim.AdamW:
    """AdamW with rates of their own for backbone and head; weights decay, biases, norms and scales do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            lr = settings.backbone_lr if name.startswith("backbone.") else settings.lr
            decay = settings.weight_decay if parameter.ndim > 1 and not name.endswith("bias") else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
    )


def schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that rise from zero for `warmup` steps, and fall to zero as a cosine until `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Average:
    """The exponential moving average of a model's weights and statistics.

    It copies tensors, not modules, so it holds for sharded models too. At first it follows faster, as an average of
    everything so far: a constant decay would drag the random start along through a short training.

    Args:
        model: The model to follow.
        decay: What is kept at each step, in the end.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.tensors = {name: t.detach().clone() for name, t in _tensors(model)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after optimizer step `step`, counted from 1."""
        decay = min(self._decay, step / (step + 10))
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
