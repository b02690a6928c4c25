"""Whether two modules, or two residual branches, are of one kind, so that what is proven of one holds for the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire._torch import AnyDropout
from revwire.libraries.drop import is_drop_path, without_rates

if TYPE_CHECKING:
    from torch import nn

    from revwire.find.residual import Residual


_PLAIN = (bool, int, float, str, tuple, type(None))


def plain_attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The numbers, words and the like that a module holds, but for its mode."""
    held = ((k, repr(v)) for k, v in vars(module).items() if k != "training" and isinstance(v, _PLAIN))
    return tuple(sorted(held))


def kind_of(residual: Residual) -> tuple[Any, ...]:
    """What two residuals have in common whose branches may be cut alike: code, modules, settings and shapes."""
    module = residual.frame.module
    called = (m for path in residual.modules for m in module.get_submodule(path).modules())
    shapes = tuple(repr(n.meta["value"]) for n in (residual.skip, *residual.sides))
    return residual.index, residual.post_name, _settings(module), tuple(map(_settings, called)), shapes


def _settings(module: nn.Module) -> tuple[Any, ...]:
    held = plain_attributes(module)
    if isinstance(module, AnyDropout) or is_drop_path(module):
        # branches are tried in eval mode; and blocks that are alike have other rates
        held = without_rates(held)
    return type(module), held
