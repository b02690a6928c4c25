"""Operations that hand on the values of their first argument: casts, copies, slices that leave nothing out.

To a reader `x.float() + f(x)`, `x.clone() + f(x)` and `x[:, :] + f(x)` are `x + f(x)`. Which do so depends on
dtypes and shapes, so a graph in which one was seen through holds for calls of the same ones alone.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from revwire.trace.operation import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

_COPIES = {"clone", "contiguous", "as_tensor", "asarray"}
_CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"} | _COPIES
_RESHAPES = {"view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "broadcast_to", "flatten"}
_RESHAPES |= {"squeeze", "unflatten", "narrow"}
_EITHER_WAY = {operator.add, torch.add, operator.mul, torch.mul}
_NEUTRAL: dict[Callable[..., Any], int] = {
    operator.add: 0, operator.sub: 0, torch.add: 0, torch.sub: 0, operator.mul: 1, operator.truediv: 1, torch.mul: 1,
    torch.div: 1,
}  # fmt: skip


def passed_on(node: fx.Node) -> tuple[fx.Node, str | None] | None:
    """What a node hands on the values of, and what else that hangs on: `"shape"`, `"dtype"` or nothing.

    None where it does more. A cast to another floating-point dtype counts: see `changes_dtype`.
    """
    source = node.args[0] if node.args else None
    if node.target in _EITHER_WAY and len(node.args) == 2 and not isinstance(source, fx.Node):
        source = node.args[1]  # sum([x, f(x)]) begins with 0 + x
    if node.op not in {"call_function", "call_method"} or not isinstance(source, fx.Node):
        return None
    value, given = node.meta.get("value"), source.meta.get("value")
    if not isinstance(value, Tensor) or not isinstance(given, Tensor) or value.shape != given.shape:
        return None
    if value.device != given.device or node.meta.get("changes"):
        return None
    name = name_of(node)
    if name in _CASTS:
        floating = value.dtype == given.dtype or (value.is_floating_point() and given.is_floating_point())
        return (
            (source, None if name in _COPIES and value.dtype == given.dtype else "dtype")
            if floating
            else None
        )
    if value.dtype != given.dtype:
        return None
    if name in _RESHAPES or (name == "getitem" and _is_all(node.args[1])):
        return source, "shape"
    return (source, None) if _adds_nothing(node) else None


def changes_dtype(node: fx.Node) -> bool:
    """Whether a node casts to another dtype: what was cast before a sum has to be cast back after it."""
    passed = passed_on(node)
    return passed is not None and bool(node.meta["value"].dtype != passed[0].meta["value"].dtype)


def loses_bits(node: fx.Node) -> bool:
    """Whether a node rounds to less than single precision: of a sum that is cast back, but of no trunk before it."""
    return changes_dtype(node) and node.meta["value"].dtype.itemsize < torch.float32.itemsize


def _is_all(index: Any) -> bool:
    """Whether an index is of slices alone: where the shape stays as it is, they leave nothing out."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or (isinstance(part, slice) and part.step in {None, 1}) for part in parts)


def _adds_nothing(node: fx.Node) -> bool:
    """Whether a node adds zeros, multiplies by one or drops with a rate of zero."""
    rest, named = node.args[1:], node.kwargs
    if node.target in _NEUTRAL:
        rest = node.args[:1] if isinstance(rest[0] if rest else None, fx.Node) else rest
        return len(rest) == 1 and not named and _is(rest[0], _NEUTRAL[node.target])
    if node.target in {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d}:
        return _is(rest[0] if rest else named.get("p"), 0)
    if node.target is functional.pad:
        pads = rest[0] if rest else named.get("pad", ())
        return isinstance(pads, tuple | list) and all(_is(pad, 0) for pad in pads)
    return False


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and value == number
