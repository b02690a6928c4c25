"""Why a residual addition cannot become a step: running its branch in one piece, or again, would change results."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, fx

from revwire.find.elementwise import may_draw
from revwire.trace.frame import Frame, storage
from revwire.trace.proxy import updated

if TYPE_CHECKING:
    from revwire.find.residual import Residual


def refusal(residual: Residual) -> str | None:
    """The reason in words why a residual by itself cannot become a step; None where it can."""
    where = f"the residual at {residual.line}"
    own = {*residual.inside, *residual.post, *residual.sums}
    outside = {
        storage(n.meta["value"])
        for n in (residual.skip, *residual.sides)
        if isinstance(n.meta["value"], Tensor)
    }
    if any(outside & node.meta["changes"] for node in (*residual.inside, *residual.post)):
        return (
            f"{where} changes a tensor in place that its branch is given, so the branch cannot be run again"
        )
    if _draws_in_turns(residual, own):
        return f"{where} has a branch that draws random numbers in turns with other code, so neither can run as one"
    for node in own:
        for user in node.users.keys() - own:
            if user.target is updated and node in user.all_input_nodes[1:]:
                what = (
                    "adds to a part of a larger tensor"
                    if node in residual.sums
                    else "changes a tensor of its branch"
                )
                return f"{where} {what} in place, which the code after it reads"
    return None


def _draws_in_turns(residual: Residual, own: set[fx.Node]) -> bool:
    """Whether other code draws random numbers after the branch began to and before it ends."""
    began = False
    for node in residual.total.graph.nodes:
        if node is residual.total:
            return False
        if node in own:
            began |= may_draw(residual.frame, node)
        elif began and may_draw(residual.frame, node):
            return True
    return False


def without_cycles(frame: Frame, residuals: list[Residual]) -> list[Residual]:
    """The residuals, those refused whose branches read inner values of each other: neither could run first."""
    while True:
        chosen = [r for r in residuals if not r.refused]
        stuck = _stuck(frame, chosen)
        if not stuck:
            return residuals
        worst = max(stuck, key=lambda r: len(r.shared))
        why = f"the residual at {worst.line} and another one read inner values of each other's branches"
        residuals = [replace(r, refused=why) if r is worst else r for r in residuals]


def _stuck(frame: Frame, residuals: list[Residual]) -> list[Residual]:
    """Those residuals that could not run as steps because each waits for what another one hands out."""
    assert frame.graph is not None
    sums = {residual.total: residual for residual in residuals}
    inner = {n for r in residuals for n in (*r.inside, *r.post, *r.sums)} - sums.keys()
    waiting = [node for node in frame.graph.nodes if node not in inner]
    done: set[fx.Node] = set()
    while waiting:
        later = []
        for node in waiting:
            residual = sums.get(node)
            reads = (residual.skip, *residual.sides) if residual else node.all_input_nodes
            # an inner node that no step hands out is recomputed from what is at hand
            if all(read in done or not _handed_out(read, residuals, done) for read in reads):
                done.update((node,) if residual is None else (node, residual.result, *residual.shared))
            else:
                later.append(node)
        if len(later) == len(waiting):
            return [sums[node] for node in later if node in sums]
        waiting = later
    return []


def _handed_out(node: fx.Node, residuals: list[Residual], done: set[fx.Node]) -> bool:
    """Whether `node` comes out of a step that is still to run, or is itself still to run."""
    inside = any(node in r.inside and node not in r.shared and node is not r.total for r in residuals)
    return node not in done and not inside
