"""What to call a model with, however the user said it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revwire.errors import RewireError
from revwire.libraries.interface import example_inputs as own_inputs


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call `model` with: the example inputs as `(args, kwargs)`, its library's where there are none.

    Raises:
        RewireError: there are none, and the model does not know its own.
    """
    if example_inputs is None:
        example_inputs = own_inputs(model)
        if example_inputs is None:
            raise RewireError(
                f"what does {type(model).__name__} take? Pass example_inputs: a tensor, a tuple of arguments, or a "
                "dict of keyword arguments, such as torch.zeros(2, 3, 224, 224)"
            )
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise RewireError(
        f"example_inputs must be a tensor, a tuple or a dict, not {type(example_inputs).__name__}"
    )
