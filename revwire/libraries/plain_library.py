"""What libraries have in common whose models are built from a name and arguments, and whose files are state dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from revwire.libraries.comparison import difference
from revwire.libraries.fit import Fit
from revwire.libraries.interface import noise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from revwire.libraries.interface import Architecture


def shown(model_args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the arguments, what a message shows: all."""
    return dict(model_args)


def settings_of(model: nn.Module) -> None:
    """There is nothing but the weights."""
    del model


def fit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
    """Whether a state dict fits an architecture strictly, as its library loads it; the first few faults in words.

    The architecture is built on the meta device: a wrong one costs no memory, however large.

    Args:
        architecture: What the tensors should fit.
        tensors: The state dict.
    """
    return Fit(faults=difference(architecture.outline(), tensors))


def load(architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """An architecture with the weights of a state dict that fits; the global random state stays as it was.

    Tensors are copied one by one, so mapped ones are never in memory twice.

    Args:
        architecture: What to build.
        tensors: The state dict.
        dtype: What the model computes in.

    Returns:
        The model on the CPU, in train mode.
    """
    return filled(built(architecture, dtype), tensors)


def built(architecture: Architecture, dtype: torch.dtype) -> nn.Module:
    """The model before any weights, in that dtype; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return architecture.build().to(dtype)


def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model with the weights of a state dict that fits it."""
    model.load_state_dict(tensors, strict=False)  # strictness, and its exceptions, are fit's
    return model


def sized_inputs(model: nn.Module, size: Sequence[int], batch: int = 2) -> Tensor:
    """Noise of a size: channels, frames of a video model, height and width."""
    return noise(model, size, batch)


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    return tensors


def companions(architecture: Architecture) -> Mapping[str, str]:
    """The files that belong beside the weights: none."""
    del architecture
    return {}


def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture | None:
    """The model that a `config.json` describes: none, as this library writes no such file."""
    del config, tensors
    return None


def respelled(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Tensors in a layout of others under this library's names: none is known."""
    del tensors
    return None


def with_config(name: str, config: Mapping[str, Any]) -> Architecture | None:
    """The named model as a `config.json` completes it: None, as a name and arguments are enough."""
    del name, config
    return None


def from_training(checkpoint: Mapping[Any, Any]) -> Architecture | None:
    """The model that a training checkpoint names: none, as this library's scripts note none."""
    del checkpoint
    return None
