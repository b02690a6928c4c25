"""Checks of a forward's numbers, `if not torch.isfinite(x).all()`: taken to pass while it is traced, made when it runs.

DETR's encoder layers, and those of some twenty other families, look for infs in training alone and clamp them. A graph
cannot go either way; what it can do is to go the way of healthy numbers, and to say so where they are not.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from revwire._torch import only_shapes
from revwire.errors import RewireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# what each says of a finite number
_HEALTHY = {"isfinite": True, "isinf": False, "isnan": False, "isposinf": False, "isneginf": False}
# what may be made of that on the way to a decision, by the names of functions, methods and operators
_JOINED: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(("all", "any"), bool),
    **dict.fromkeys(("logical_not", "invert", "inv", "__invert__"), operator.not_),
    **dict.fromkeys(("logical_or", "or_", "__or__"), operator.or_),
    **dict.fromkeys(("logical_and", "and_", "__and__"), operator.and_),
}


def finite(tensor: Any, line: str) -> None:
    """Stands in a graph for a check that was taken to pass when it was traced.

    Raises:
        RewireError: it does not pass now, so the code would go another way than the one that was traced.
    """
    if not only_shapes() and not bool(torch.isfinite(tensor).all()):
        raise RewireError(
            f"the check at {line} found numbers that are not finite, and its code would now go another way than the "
            "rewired one; find where they come from (fp16 overflows where bf16 does not), or exclude the module"
        )


def outcome(node: fx.Node, checked: set[fx.Node]) -> bool | None:
    """What a decision comes out as where all numbers are finite; None if it is about anything else.

    Args:
        node: What is decided by.
        checked: Gets the nodes of the tensors that it looks at.
    """
    name = _name(node)
    if (said := _HEALTHY.get(name)) is not None and len(node.all_input_nodes) == 1:
        checked.add(node.all_input_nodes[0])
        return said
    if name not in _JOINED or node.kwargs:
        return None
    terms = [outcome(arg, checked) if isinstance(arg, fx.Node) else None for arg in node.args]
    return None if not terms or None in terms else _JOINED[name](*terms)


def drop_checks(nodes: Iterable[fx.Node]) -> None:
    """Erase what only led to decisions that `finite` makes now; `nodes` in graph order."""
    for node in reversed(list(nodes)):
        if not node.users and outcome(node, set()) is not None:
            node.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    if node.op not in {"call_function", "call_method"}:
        return ""
    return str(getattr(node.target, "__name__", node.target))
