"""The residual additions of a frame's graph.

A residual addition is a sum one of whose terms, the skip, all other terms depend on. Sums of several branches
(parallel blocks, `x + attn(x) + mlp(x)`) are one residual; `nn.Identity` on the skip is seen through; a skip that is
merely scaled (`s * x + F(x)`) counts. What looks like a residual and cannot become a step is returned with its reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from revwire.find.elementwise import elementwise_after, is_elementwise, scaled
from revwire.find.pieces import pieced
from revwire.find.refusals import refusal, without_cycles
from revwire.find.residual import Residual
from revwire.trace.graph import ancestors, between, dependents, seen_through
from revwire.trace.proxy import updated
from revwire.trace.sums import flatten, is_addition

if TYPE_CHECKING:
    from collections.abc import Collection

    from revwire.trace.frame import Frame


def find_residuals(frame: Frame) -> tuple[list[Residual], list[str]]:
    """All residual additions of a traced frame, in running order, and reasons why some sums are none.

    Returns:
        The residuals (those with `refused` set cannot become steps), and the reasons in words.
    """
    assert frame.graph is not None
    found: list[Residual] = []
    reasons: list[str] = []
    inner: set[fx.Node] = set()
    additions = {node for node in frame.graph.nodes if is_addition(node)}
    for total in reversed(frame.graph.nodes):
        if total in inner:
            continue
        if (pieces := pieced(total, additions)) is not None and _computed_from(pieces.trunk, pieces.added):
            inner |= pieces.additions
            inside = between(pieces.trunk, (total,))
            found.append(Residual(frame, 0, pieces.trunk, total, (total,), inside, scale=total))
            continue
        if total not in additions:
            continue
        terms = flatten(total, inner)
        if (skipped := _skip_of(frame, terms)) is not None:
            branches = tuple(t for t in terms if seen_through(frame, t) is not skipped)
            found.append(Residual(frame, 0, skipped, total, branches, between(skipped, branches)))
        elif (changed := _changed_skip_of(frame, terms, additions)) is not None:
            skip, scale = changed
            inner |= {scale, *(n for n in between(skip, (scale,)) if n in additions)}
            found.append(Residual(frame, 0, skip, total, terms, between(skip, terms), scale=scale))
        elif reason := _near_miss(frame, total, terms):
            reasons.append(reason)
    found.reverse()
    skips = {residual.skip for residual in found}
    ordered = [
        replace(
            r, index=i, post=_post_operations(r, skips), following=elementwise_after(frame, r.total, skips)
        )
        for i, r in enumerate(found)
    ]
    return without_cycles(frame, [replace(r, refused=refusal(r)) for r in ordered]), reasons[::-1]


def _skip_of(frame: Frame, terms: tuple[fx.Node, ...]) -> fx.Node | None:
    for term in terms:
        source = seen_through(frame, term)
        others = [t for t in terms if t is not term]
        if all(_broadcasts_into(o, source) for o in others) and _computed_from(source, others):
            return source
    return None


def _computed_from(source: fx.Node, terms: Collection[fx.Node]) -> bool:
    """Whether all terms depend on the values of `source`, and not only because it was what changed them in place."""
    after = dependents(source)
    return after.issuperset(terms) and all(t.target is not updated or t.args[0] in after for t in terms)


def _changed_skip_of(
    frame: Frame, terms: tuple[fx.Node, ...], additions: set[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """The trunk of a sum that adds it scaled, or put together from pieces, and the node that does."""
    for term in terms:
        pieces = pieced(term, additions)
        source = pieces.trunk if pieces else scaled(frame, term)
        others = [t for t in terms if t is not term]
        if source is None or not all(_broadcasts_into(o, source) for o in others):
            continue
        if _computed_from(source, [*others, *(pieces.added if pieces else ())]):
            return source, term
    return None


def _broadcasts_into(term: fx.Node, trunk: fx.Node) -> bool:
    shape: torch.Size = trunk.meta["value"].shape
    try:
        return bool(torch.broadcast_shapes(term.meta["value"].shape, shape) == shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False


def _near_miss(frame: Frame, total: fx.Node, terms: tuple[fx.Node, ...]) -> str | None:
    """The reason, if a sum looks like a residual to a reader and is none."""
    where = f"the sum at {total.meta['line']}"
    shared = [
        n
        for n in ancestors([terms[0]]) & ancestors(terms[1:])
        if isinstance(n.meta.get("value"), Tensor) and n.op != "get_attr"
    ]
    for term in terms:
        others = [t for t in terms if t is not term]
        source = seen_through(frame, term)
        if source.target is updated and {*others, *ancestors(others)}.intersection(
            source.all_input_nodes[1:]
        ):
            return f"{where} adds what its branch has changed in place, so there is no unchanged input to go back to"
        if dependents(source).issuperset(others):
            shapes = " and ".join("x".join(map(str, t.meta["value"].shape)) for t in (term, *others))
            return f"{where} adds tensors of different shapes ({shapes})"
    if shared and any(t.op == "call_module" for t in terms):
        names = ", ".join(str(t.target) for t in terms if t.op == "call_module")
        return f"{where} adds no unchanged input: each of {names} changes it"
    return None


def _post_operations(residual: Residual, skips: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Elementwise operations after the sum up to the next trunk: the ReLU of a post-activation block."""
    post: list[fx.Node] = []
    node = residual.total
    while len(node.users) == 1 and node not in skips:
        (user,) = node.users
        if not is_elementwise(residual.frame, user, node):
            break
        post.append(user)
        node = user
    ends_frame = any(user.op == "output" for user in node.users)
    return tuple(post) if ends_frame or node in skips else ()
