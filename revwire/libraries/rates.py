"""Random rates at zero: a model in train mode that drops nothing, so that what is left of training can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from revwire.libraries.drop import is_drop_path
from revwire.pytree import is_object

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
DROPOUTS: set[Any] = {
    *(getattr(functional, kind) for kind in _KINDS),
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}
"""The functions that drop: each acts on a tensor, and passes it on at a rate of zero."""


class Undropped(TorchFunctionMode):
    """For the length of the block, functions that drop values pass them on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            # the rate is its fifth argument
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {**kwargs, "dropout_p": 0.0} if len(args) <= 4 else kwargs
        return func(*args, **kwargs)


def stop_dropping(model: nn.Module) -> None:
    """Set all rates to zero at which a model's modules, and the settings that they hold, drop values or layers."""
    for module in model.modules():
        named = "drop" in type(module).__name__.lower() or is_drop_path(module)
        for owner in _owners(module):
            for key in [key for key, value in vars(owner).items() if _is_rate(key, value, named=named)]:
                try:
                    setattr(owner, key, 0.0)
                except (AttributeError, TypeError, ValueError):
                    continue  # settings that cannot be set


def _owners(module: nn.Module) -> Iterator[Any]:
    yield module
    yield from (held for key, held in vars(module).items() if not key.startswith("_") and is_object(held))


def _is_rate(key: str, value: Any, *, named: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1 and ("drop" in key or (named and key in {"p", "rate", "prob"}))
