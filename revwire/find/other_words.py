"""Residual additions without a plus: `x - f(x)`, `torch.add(x, f(x), alpha=0.5)`, `torch.lerp(x, f(x), w)`.

They are steps as a whole, `F(x) = G(x) - x`, whatever the operation makes of its first term.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from revwire.trace.operation import name_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeGuard

# in place they would change the trunk that their branch is given
_METHODS = {"sub", "add", "subtract", "addcmul", "addcdiv", "lerp", "baddbmm", "addmm", "__sub__"}
_FUNCTIONS = {operator.sub, torch.sub, torch.subtract, torch.add, torch.addcmul, torch.addcdiv}
_FUNCTIONS |= {torch.lerp, torch.addmm, torch.baddbmm}


def told_otherwise(total: fx.Node) -> Iterable[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The terms that a node may add the others to, and those others; nothing where it adds up nothing."""
    terms = _stacked(total)
    if terms:
        for term in terms:
            yield term, tuple(other for other in terms if other is not term)
        return
    named = total.op == "call_method" and str(total.target) in _METHODS
    if not named and total.target not in _FUNCTIONS:
        return
    given = [value for value in (*total.args, *total.kwargs.values()) if _is_tensor(value)]
    # a bias that is added to a product comes first, too
    if len(given) > 1 and total.args[:1] == (given[0],) and given[0].op != "get_attr":
        yield given[0], tuple(given[1:])


def _stacked(total: fx.Node) -> list[fx.Node]:
    """The terms of `torch.stack([...]).sum(0)`."""
    stack: Any = total.args[0] if name_of(total) == "sum" and total.args else None
    if not _is_tensor(stack) or name_of(stack) != "stack":
        return []
    terms: Any = stack.args[0]
    along = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    over = total.args[1] if len(total.args) > 1 else total.kwargs.get("dim")
    over = over[0] if isinstance(over, list | tuple) and len(over) == 1 else over
    if over != along or total.kwargs.get("keepdim") or not all(map(_is_tensor, terms)):
        return []
    return list(terms)


def _is_tensor(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("value"), Tensor)
