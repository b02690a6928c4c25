"""A timm model with random images and labels as a case to measure, for `benchmarks.memory` and `benchmarks.depth`."""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional

from benchmarks.shared.step_measurement import Case
from revwire.errors import RevwireError
from revwire.libraries.timm_models import create


class Amp(str, Enum):
    """Autocast of the forward."""

    none = "none"
    bf16 = "bf16"

    @property
    def dtype(self) -> torch.dtype | None:
        """What the forward casts to."""
        return torch.bfloat16 if self is Amp.bf16 else None


def timm_case(
    spec: str,
    *,
    batch: int = 4,
    size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    model_args: dict[str, Any] | None = None,
) -> Case:
    """A timm model with random weights, random images and random labels.

    Args:
        spec: timm's name of the model, with `@` and a batch size of its own if it is to differ: `resnet50@8`.
        batch: Images in the step where the spec does not say.
        size: Height and width of the images; the model's own if not given.
        device: Where to run.
        seed: Seed of weights, images and labels.
        model_args: Further arguments of `timm.create_model`, `{"depth": 48}`.

    Raises:
        RevwireError: timm has no such model or refuses the arguments, or the batch size is no number.
    """
    name, _, own_batch = spec.partition("@")
    if own_batch and not (own_batch.isdecimal() and int(own_batch)):
        raise RevwireError(f"the batch size after @ has to be a whole number, found {spec!r}")
    count = int(own_batch) if own_batch else batch
    torch.manual_seed(seed)
    config = timm.get_pretrained_cfg(name)
    resized = {"img_size": size} if size and config is not None and config.fixed_input_size else {}
    model: Any = create(name, resized | (model_args or {}))
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    channels, height, width = model.default_cfg["input_size"]
    shape = (count, channels, size or height, size or width)
    labels = torch.randint(model.num_classes, (count,), device=device)

    def factory() -> nn.Module:
        placed: nn.Module = model.to(device).train()
        return placed

    return Case(
        name=f"{name}, batch {count}",
        factory=factory,
        inputs=torch.randn(shape, device=device),
        loss_fn=partial(functional.cross_entropy, target=labels),
        about={"model": name, "input": list(shape), "drop_path": 0.0},
    )
