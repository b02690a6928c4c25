"""In what order a frame's steps can run: each after what its branch reads, which another step may hand out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import fx

    from revwire.find.residual import Residual


def needed(
    graph: fx.Graph,
    steps: Collection[Residual],
    joined: set[fx.Node],
    read: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> set[fx.Node]:
    """The nodes that the rewritten forward still runs: all but what only a planned branch or a joined call needs.

    Args:
        graph: The frame's.
        steps: The residuals that run as steps.
        joined: What runs in joined calls, but for the last of each.
        read: What the calls that stand for nodes read: a step the trunk and the branch's side inputs.
    """
    inner = {n for residual in steps for n in (*residual.inside, *residual.post, *residual.sums)} | joined
    sums = {residual.total for residual in steps}
    given = {n: residual.total for residual in steps for n in (*residual.shared, residual.result)}
    found: set[fx.Node] = set()
    waiting = [n for n in graph.nodes if n not in inner or n in sums]
    while waiting:
        node = waiting.pop()
        node = given.get(node, node)
        if node in found:
            continue
        found.add(node)
        waiting.extend(read.get(node, node.all_input_nodes))
    return found


def stuck(graph: fx.Graph, steps: Collection[Residual]) -> list[Residual]:
    """Those of the residuals that could not run as steps because each waits for what another one hands out."""
    sums = {residual.total: residual for residual in steps}
    read = {total: (residual.skip, *residual.sides) for total, residual in sums.items()}
    wanted = needed(graph, steps, set(), read)
    waiting = [node for node in graph.nodes if node in wanted]
    done: set[fx.Node] = set()
    while waiting:
        later = []
        for node in waiting:
            if not done.issuperset(read.get(node, node.all_input_nodes)):
                later.append(node)
            elif (residual := sums.get(node)) is not None:
                done.update((node, residual.result, *residual.shared))
            else:
                done.add(node)
        if len(later) == len(waiting):
            return [sums[node] for node in later if node in sums]
        waiting = later
    return []
