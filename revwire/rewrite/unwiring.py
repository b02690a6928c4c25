"""The way back: a rewired model with the classes that it had."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from revwire.errors import RewireError
from revwire.rewrite import mark
from revwire.rewrite.wired import PLAN, PLANNED, PROGRAM, is_wired

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


def unwire(model: nn.Module) -> nn.Module:
    """Put a rewired model back: the same classes, the same code, the parameters as they are now.

    Raises:
        RewireError: the model is not rewired, or the class of one of its modules was replaced since (FSDP2,
            parametrizations).
    """
    for module in _wired(model, "so there is nothing to undo"):
        _take_off(module)
    mark.take_off(model)
    return model


@contextmanager
def unwired(model: nn.Module) -> Iterator[nn.Module]:
    """For the length of the block, a rewired model is the network it was: what runs in between is the original.

    For tools that look at what every module returns and know nothing but tensors (torchinfo, torchview), and to compare
    with the original network on the weights of now. A backward of what ran before the block may run within it.

    Raises:
        RewireError: as `unwire`.
    """
    taken = [
        (module, type(module), _take_off(module)) for module in _wired(model, "so it is the network it was")
    ]
    try:
        yield model
    finally:
        for module, cls, own in taken:
            module.__class__ = cls
            module.__dict__.update(own)


def _wired(model: nn.Module, otherwise: str) -> list[nn.Module]:
    """The modules whose classes were made here."""
    wired = [(path, module) for path, module in model.named_modules() if is_wired(module)]
    if not wired:
        raise RewireError(f"{type(model).__name__} is not rewired, {otherwise}")
    for path, module in wired:
        if "revwire_original" not in vars(type(module)):
            raise RewireError(
                f"{path or '(model)'}: since it was rewired its class was replaced by {type(module).__name__}, as "
                "fully_shard and parametrizations do; undo that first, or unwire before it"
            )
    return [module for _, module in wired]


def _take_off(module: nn.Module) -> dict[str, Any]:
    """Put a module's class back; returns the attributes that the class made here went by."""
    module.__class__ = cast("Any", type(module)).revwire_original
    return {name: module.__dict__.pop(name) for name in (PROGRAM, PLAN, PLANNED) if name in module.__dict__}
