"""Blocks of an `nn.Sequential` that keep their input's shape: steps for couplings that keep `x[i]` in `x[i+1]`.

A child `G` of an `nn.Sequential` counts as the block `x + F(x)` with `F(x) = G(x) - x`, whatever its code does inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from revwire.find.elementwise import elementwise_after, is_elementwise
from revwire.find.norms import is_norm
from revwire.find.refusals import refusal
from revwire.find.residual import Residual
from revwire.trace.frame import original_forward
from revwire.trace.graph import seen_through

if TYPE_CHECKING:
    from revwire.trace.frame import Frame


def is_sequence(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other; a subclass with a forward of its own is no sequence."""
    return getattr(original_forward(module), "__func__", None) is nn.Sequential.forward


def find_blocks(frame: Frame) -> list[Residual]:
    """The children of an `nn.Sequential` that keep their input's shape, with the activations and norms after each."""
    assert frame.graph is not None
    if not is_sequence(frame.module):
        return []
    found: list[Residual] = []
    joined: set[fx.Node] = set()
    for node in frame.graph.nodes:
        if node in joined or not _keeps_shape(frame, node):
            continue
        (skip,) = node.all_input_nodes
        inside = (node, *elementwise_after(frame, node))
        joined.update(inside)
        block = Residual(
            frame, len(found), skip, inside[-1], inside[-1:], inside, scale=inside[-1], block=True
        )
        found.append(replace(block, refused=refusal(block)))
    return found


def _keeps_shape(frame: Frame, node: fx.Node) -> bool:
    """Whether a node is a child, and more than an activation, that gives back a tensor like the one it takes."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    (source,) = node.all_input_nodes
    taken, given = source.meta.get("value"), node.meta.get("value")
    if not isinstance(taken, Tensor) or not isinstance(given, Tensor) or not given.is_floating_point():
        return False
    if (taken.shape, taken.dtype) != (given.shape, given.dtype) or seen_through(frame, node) is not node:
        return False
    return not is_elementwise(frame, node, source) and not is_norm(frame, node, source)
