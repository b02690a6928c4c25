"""Modules that drop values at random in training, whichever library wrote them: dropout and drop path."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_DROP_PATHS = {"DropPath", "StochasticDepth"}
_RATES = ("p", "drop_prob")


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module drops whole branches, sample by sample (stochastic depth)."""
    return type(module).__name__ in _DROP_PATHS or isinstance(getattr(module, "drop_prob", None), float)


def drops(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training to drop values, at a rate that is not 0."""
    rate = next((getattr(module, key) for key in _RATES if hasattr(module, key)), 1)
    named = any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))
    return named and not any(True for _ in module.children()) and rate != 0


def without_rates(attributes: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Names and values of a module's attributes, but for the rate at which it drops."""
    return tuple((name, value) for name, value in attributes if name not in _RATES)
