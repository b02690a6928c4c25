"""Children that a frame calls one after the other (conv, norm, act), each on the output of the one before.

Nothing else reads those outputs, so together the children are one function of the first one's input, as if the author
had put a module around them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx

from revwire.trace.frame import storage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from revwire.trace.frame import Frame

Calls = tuple[fx.Node, ...]
"""Calls of children in a frame's graph, in the order they run."""


def lines(frame: Frame, taken: Collection[fx.Node]) -> list[Calls]:
    """The longest sequences of such calls in a frame, nothing in between, single ones too, without what is `taken`."""
    assert frame.graph is not None
    found: list[list[fx.Node]] = []
    last: fx.Node | None = None
    for node in (n for n in frame.graph.nodes if n.op not in {"placeholder", "get_attr"}):
        # what runs in between may draw random numbers, in an order that has to stay
        before, last = last, node
        if node in taken or not _is_function_of_one(node):
            continue
        end = found[-1][-1] if found else None
        if end is not None and end is before and end is node.args[0] and len(end.users) == 1:
            found[-1].append(node)
        else:
            found.append([node])
    return list(map(tuple, found))


def places(frame: Frame, children: tuple[str, ...], taken: Collection[fx.Node]) -> Iterator[Calls]:
    """Where a frame calls just these children one after the other, and what enters the first stays as it is."""
    for line in lines(frame, taken):
        targets = tuple(str(node.target) for node in line)
        start = 0
        while start + len(children) <= len(line):
            nodes = line[start : start + len(children)]
            if targets[start : start + len(children)] == children and keeps_input(frame, nodes):
                yield nodes
                start += len(children)
            else:
                start += 1


def keeps_input(frame: Frame, nodes: Calls) -> bool:
    """Whether neither these calls nor what the frame does after them changes the input of the first one in place."""
    assert frame.graph is not None
    given = storage(nodes[0].all_input_nodes[0].meta["value"])
    later = (node for node in frame.graph.nodes if node >= nodes[0])
    return not any(given in changed_by(frame, node) for node in later)


def changed_by(frame: Frame, node: fx.Node) -> frozenset[int]:
    """The storages that a node changes in place, in training too: the recorded run was in eval mode."""
    changes: frozenset[int] = node.meta.get("changes", frozenset())
    if node.op == "call_module" and getattr(frame.module.get_submodule(str(node.target)), "inplace", False):
        # nn.Dropout(inplace=True) changes nothing in eval mode
        values = (source.meta["value"] for source in node.all_input_nodes)
        changes |= {storage(value) for value in values if isinstance(value, Tensor)}
    return changes


def _is_function_of_one(node: fx.Node) -> bool:
    """Whether a node calls a child with one tensor and nothing else, and gets one."""
    if (
        node.op != "call_module"
        or node.kwargs
        or len(node.args) != 1
        or not isinstance(node.args[0], fx.Node)
    ):
        return False
    return all(isinstance(n.meta["value"], Tensor) for n in (node, node.args[0]))
