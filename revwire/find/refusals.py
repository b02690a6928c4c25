"""Why a residual addition cannot become a step: running its branch in one piece, or again, would change results."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, fx

from revwire.find.elementwise import may_draw
from revwire.find.order import stuck
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
    assert frame.graph is not None
    while True:
        waiting = stuck(frame.graph, [r for r in residuals if not r.refused])
        if not waiting:
            return residuals
        # of two trunks that one attention joins, the larger one is the chain
        worst = max(waiting, key=lambda r: (bool(r.shared), -r.skip.meta["value"].numel(), len(r.shared)))
        why = f"the residual at {worst.line} and another one read inner values of each other's branches"
        residuals = [replace(r, refused=why) if r is worst else r for r in residuals]
