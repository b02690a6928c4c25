"""The residual additions of a frame's graph.

A residual addition is a sum one of whose terms, the skip, all other terms depend on. Sums of several branches
(parallel blocks, `x + attn(x) + mlp(x)`) are one residual; what hands the skip or the sum on (`nn.Identity`, a copy, a
cast and the cast back) is seen through; a skip that is merely scaled (`s * x + F(x)`) counts. What looks like a
residual and cannot become a step is returned with its reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from revwire.find.elementwise import elementwise_after, is_elementwise, scaled
from revwire.find.other_words import told_otherwise
from revwire.find.pieces import pieced
from revwire.find.refusals import refusal, without_cycles
from revwire.find.residual import Residual
from revwire.trace.graph import ancestors, between, dependents, handed_on, rearranges, seen_through
from revwire.trace.passing import passed_on
from revwire.trace.proxy import updated
from revwire.trace.sums import flatten, is_addition

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

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
            if (residual := _in_other_words(frame, total)) is not None:
                found.append(residual)
            continue
        terms = flatten(total, inner)
        if (residual := _summed(frame, total, terms)) is not None:
            frame.guards.looked_at |= residual.looks
            found.append(residual)
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


def _skip_of(frame: Frame, terms: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The trunk of a sum, and the term that hands it on; the nearest that all other terms are computed from."""
    for term in terms:
        others = [t for t in terms if t is not term]
        for source in handed_on(frame, term):
            again = any(source in handed_on(frame, other) for other in others)
            if again or not all(_broadcasts_into(o, source) for o in others):
                continue
            if _computed_from(source, others):
                return source, term
    return None


def _summed(frame: Frame, total: fx.Node, terms: tuple[fx.Node, ...]) -> Residual | None:
    """The residual that a sum is, if one of its terms hands on what all others are computed from."""
    if (found := _skip_of(frame, terms)) is None:
        return None
    skip, term = found
    branches = tuple(t for t in terms if t is not term)
    passing, end = [*_way(term, skip)], total
    # what hands the sum on is a part of it: a copy, the cast back
    while len(end.users) == 1:
        (user,) = end.users
        if passed_on(user) is None or user.args[0] is not end or rearranges(user):
            break
        if set(user.all_input_nodes) - {end, skip}:
            break
        passing.append(user)
        end = user
    if end.meta["value"].dtype != skip.meta["value"].dtype:
        return None
    inside = between(skip, branches)
    return Residual(frame, 0, skip, end, branches, inside, passing=tuple(passing), added=total)


def _in_other_words(frame: Frame, total: fx.Node) -> Residual | None:
    """The residual that a node is which adds up without a plus."""
    if not isinstance(value := total.meta.get("value"), Tensor):
        return None
    for term, others in told_otherwise(total):
        skip, given = seen_through(frame, term), term.meta["value"]
        if (value.shape, value.dtype) != (given.shape, given.dtype) or skip.op == "get_attr":
            continue
        # `x - x.mean(-1)` centres a tensor, and is no block of it
        if _computed_from(skip, others) and any(o.meta["value"].shape == given.shape for o in others):
            return Residual(frame, 0, skip, total, (total,), between(skip, (total,)), scale=total)
    return None


def _way(node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """What hands the values of `source` on to a node, that node first."""
    while node is not source:
        yield node
        node = node.all_input_nodes[0]


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
    called = [str(t.target) for t in terms if t.op == "call_module"]
    if called and any(
        isinstance(n.meta.get("value"), Tensor) and n.op != "get_attr" and dependents(n).issuperset(terms)
        for n in ancestors([terms[0]]) & ancestors(terms[1:])
    ):
        return f"{where} adds no unchanged input: each of {', '.join(called)} changes it"
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
