"""Residuals that cut the trunk into pieces, add to some and join them again; recognised by trying them on noise."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from revwire.libraries.noise import Noise
from revwire.pytree import tree_leaves
from revwire.trace.graph import rearranges
from revwire.trace.operation import function_of

if TYPE_CHECKING:
    from collections.abc import Container


_PIECES = {operator.getitem, torch.cat, torch.concat, torch.concatenate}


_PIECES |= {
    getattr(torch, name) for name in ("narrow", "select", "split", "chunk", "unbind", "squeeze", "unsqueeze")
}


_PIECE_METHODS = {"narrow", "select", "split", "chunk", "unbind", "squeeze", "unsqueeze", "tensor_split"}


@dataclass(frozen=True)
class Pieces:
    """A trunk put together again: the trunk, the additions onto its slices, and what those add."""

    trunk: fx.Node
    additions: frozenset[fx.Node]
    added: frozenset[fx.Node]


def pieced(node: fx.Node, additions: Container[fx.Node]) -> Pieces | None:
    """The trunk that `node` puts together again from its slices, with something added to some of them.

    `cat([x[:, :1], x[:, 1:] + F(x)], 1)`, as class tokens and partial residuals have it, is a residual of all of `x`.
    Proven by trying: with what is added left out, a random `x` comes out as it went in.
    """
    if node.target not in {torch.cat, torch.concat, torch.concatenate}:
        return None
    leaves: set[fx.Node] = set()
    used: set[fx.Node] = set()
    _collect_pieces(node, additions, leaves, used)
    value = node.meta["value"]
    trunks = [
        n for n in leaves if n.op != "get_attr" and getattr(n.meta["value"], "shape", None) == value.shape
    ]
    sample = Noise().normal(value.shape)
    terms = {term for addition in used for term in addition.all_input_nodes}
    for trunk in trunks if used else ():
        try:
            result = _put_together(node, additions, trunk, sample)
            added = {term for term in terms if _put_together(term, additions, trunk, sample) is None}
        except (RuntimeError, IndexError, TypeError):
            continue
        if isinstance(result, Tensor) and torch.equal(result, sample):
            return Pieces(trunk, frozenset(used), frozenset(added))
    return None


def _moves_pieces(node: fx.Node) -> bool:
    """Whether an operation only takes slices, puts them together, or rearranges what is in them."""
    if node.op == "call_module":
        return False
    return node.target in (_PIECE_METHODS if node.op == "call_method" else _PIECES) or rearranges(node)


def _collect_pieces(
    node: fx.Node, additions: Container[fx.Node], leaves: set[fx.Node], used: set[fx.Node]
) -> None:
    if node in additions:
        used.add(node)
    elif not _moves_pieces(node):
        leaves.add(node)
        return
    for source in node.all_input_nodes:
        if any(isinstance(v, Tensor) for v in tree_leaves(source.meta["value"])):
            _collect_pieces(source, additions, leaves, used)


def _put_together(node: fx.Node, additions: Container[fx.Node], trunk: fx.Node, sample: Tensor) -> Any:
    """The value of `node` for a trunk of `sample`, with what is added left out; None where it is not of the trunk."""
    if node is trunk:
        return sample
    if node in additions:
        terms = [_put_together(term, additions, trunk, sample) for term in node.all_input_nodes]
        return next((term for term in terms if term is not None), None)
    if not _moves_pieces(node):
        return None

    def value_of(source: fx.Node) -> Any:
        held = source.meta["value"]
        of_tensors = any(isinstance(v, Tensor) for v in tree_leaves(held))
        return _put_together(source, additions, trunk, sample) if of_tensors else held

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    if any(leaf is None for leaf in tree_leaves(args[:1])):
        return None
    return function_of(node)(*args, **kwargs)
