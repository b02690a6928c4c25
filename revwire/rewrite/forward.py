"""A frame's graph and its planned residuals -> Python functions: the rewritten forward and one branch a step.

The rewritten forward is the frame's own code with each planned sum, and what leads to it, replaced by a call of the
step. Children are called by name (`self.attn(...)`), so one that is replaced later is the one that runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from revwire.find.branch_code import compile_graph
from revwire.find.order import needed

if TYPE_CHECKING:
    from revwire.find.consecutive import Calls
    from revwire.find.residual import Residual
    from revwire.trace.frame import Frame


class _Self:
    """Stands in generated code for the module whose frame it is."""

    def __repr__(self) -> str:
        return "self"


RunStep = Callable[..., Any]
"""Called by the rewritten forward as `run(self, trunk, *sides)` in place of a planned sum.

Returns the trunk after the step; a tuple of it and of what the frame uses of the branch, if there is such."""


def rewritten_forward(
    frame: Frame, steps: dict[Residual, RunStep], joined: dict[Calls, RunStep] | None = None
) -> Callable[..., Any]:
    """The frame's forward, as a function of `(self, *tensors)`, with each residual's sum run as a step.

    Args:
        frame: The traced frame.
        steps: What runs in place of each sum.
        joined: What runs in place of calls of children that follow each other, as `run(self, x)`.
    """
    assert frame.graph is not None
    sums = {residual.total: residual for residual in steps}
    runs = {calls[-1]: (calls[0].all_input_nodes[0], run) for calls, run in (joined or {}).items()}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    read: dict[fx.Node, tuple[fx.Node, ...]] = {node: (entering,) for node, (entering, _) in runs.items()}
    read |= {node: (r.skip, *r.sides) for node, r in sums.items()}
    wanted = needed(frame.graph, steps, {n for calls in joined or () for n in calls[:-1]}, read)
    waiting = [node for node in frame.graph.nodes if node in wanted]
    while waiting:
        # what reads an inner value of a branch comes after the step, which hands it out with its sum
        later: list[fx.Node] = []
        for node in waiting:
            if not copies.keys() >= set(read.get(node, node.all_input_nodes)):
                later.append(node)
            elif node in runs:
                entering, run = runs[node]
                copies[node] = graph.call_function(run, (_Self(), copies[entering]))  # type: ignore[arg-type]
            elif node in sums:
                copies.update(_step_call(graph, sums[node], steps[sums[node]], copies))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        assert len(later) < len(waiting), f"{later} wait for each other"
        waiting = later
    return compile_graph(graph, f"<revwire {type(frame.module).__name__}.forward {id(graph):x}>")


def _step_call(
    graph: fx.Graph, residual: Residual, run: RunStep, copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Add the call of a step to `graph`; returns the nodes of the frame that it stands for."""
    sides = tuple(copies[n] for n in residual.sides)
    call = graph.call_function(run, (_Self(), copies[residual.skip], *sides))  # type: ignore[arg-type]
    if not residual.shared:
        return dict.fromkeys((residual.total, residual.result), call)
    trunk, *inner = (
        graph.call_function(operator.getitem, (call, i)) for i in range(1 + len(residual.shared))
    )
    return {residual.total: trunk, residual.result: trunk, **dict(zip(residual.shared, inner, strict=True))}
