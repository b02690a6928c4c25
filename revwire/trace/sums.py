"""Sums in a frame's graph: which nodes they are, and what they add up."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from revwire.pytree import tree_leaves
from revwire.trace.graph import ancestors, seen_through

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.trace.frame import Frame


_ADDITIONS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two tensors that the frame computes or is given."""
    if not isinstance(node.meta.get("value"), Tensor):
        return False
    if node.op == "call_method":
        return node.target in {"add", "add_", "__add__", "__radd__", "__iadd__"} and _two_terms(node)
    return node.op == "call_function" and node.target in _ADDITIONS and _two_terms(node)


def _two_terms(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    terms = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("value"), Tensor)]
    # a bias is part of what it is added to
    return len(terms) == 2 and all(term.op != "get_attr" for term in terms)


def flatten(total: fx.Node, inner: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The terms of a sum of sums; nested additions used nowhere else dissolve (and are added to `inner`)."""
    terms: list[fx.Node] = []
    for term in total.args:
        assert isinstance(term, fx.Node)
        if is_addition(term) and len(term.users) == 1:
            inner.add(term)
            terms.extend(flatten(term, inner))
        else:
            terms.append(term)
    return tuple(terms)


def joined_arguments(frame: Frame) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Where a frame hands on the sum of one argument and of what it made of others: the one, and the others.

    `BertSelfOutput(hidden, input)` is `norm(dense(hidden) + input)`: a residual, but of the frame that calls it.
    """
    assert frame.graph is not None
    for total in frame.graph.nodes:
        if not is_addition(total) or not _handed_on(total):
            continue
        terms = flatten(total, set())
        for term in terms:
            skip, others = seen_through(frame, term), [t for t in terms if t is not term]
            if skip.op != "placeholder" or skip.meta["value"].shape != total.meta["value"].shape:
                continue
            sources = {n for n in ancestors(others) | set(others) if n.op == "placeholder"}
            sources = {n for n in sources if isinstance(n.meta["value"], Tensor)}
            if sources and skip not in sources:
                yield skip, sources


def _handed_on(total: fx.Node) -> bool:
    """Whether a sum, at most normed, activated or the like, is the (first) tensor that its frame returns."""
    output = total.graph.output_node().all_input_nodes
    node = output[0] if output else None
    while node is not None and node is not total:
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("value"), Tensor)]
        node = sources[0] if len(sources) == 1 and node.op != "placeholder" else None
    return node is total


def may_be_planned(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether a frame may be rewritten: it adds something, or calls several children."""
    calls = sum(node.op == "call_module" for node in graph.nodes)
    return calls > 1 or any(map(is_addition, graph.nodes)) or isinstance(module, nn.Sequential)


def belongs_to_caller(child: Frame | None, frame: Frame, node: fx.Node) -> bool:
    """Whether a child's frame adds two of its arguments that are a trunk and what the caller made of it."""
    if child is None or child.graph is None:
        return False
    leaves = tree_leaves((node.args, node.kwargs))

    def given(placeholder: fx.Node) -> fx.Node | None:
        leaf = leaves[int(str(placeholder.target)[len("input_") :])]
        return seen_through(frame, leaf) if isinstance(leaf, fx.Node) else None

    def of_caller(argument: fx.Node, added: set[fx.Node]) -> bool:
        skip, others = given(argument), [given(other) for other in added]
        if skip is None or None in others:
            return False
        sources = ancestors(n for n in others if n is not None) | set(others)
        # both may be the caller's own arguments: then it is for the frame above to say
        return skip in sources or skip.op == "placeholder"

    return any(of_caller(*joined) for joined in joined_arguments(child))
