"""The operation of a node: its name, and the function that does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import fx


def name_of(node: fx.Node) -> str:
    """What a reader calls the operation of a node."""
    return getattr(node.target, "__name__", str(node.target))


def function_of(node: fx.Node) -> Any:
    """The function of tensors that a node calls; of a method the tensor's own, None where it has none."""
    return getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
