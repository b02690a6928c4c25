"""A frame's fx graph -> its residual additions.

A residual addition is a sum one of whose terms, the skip, all other terms depend on. Sums of several branches
(parallel blocks, `x + attn(x) + mlp(x)`) are one residual; `nn.Identity` on the skip is seen through; a skip that is
merely scaled (`s * x + F(x)`) counts. What looks like a residual and cannot become a step is returned with its reason.

Couplings that keep `x[i]` as a part of `x[i+1]` make a residual of any block that keeps its input's shape,
`F(x) = G(x) - x`; `find_blocks` finds those where the model itself says what a block is, in an `nn.Sequential`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from revwire.find.elementwise import is_elementwise, is_norm, pieced, scaled
from revwire.find.refusals import refusal, without_cycles
from revwire.pytree import tree_leaves
from revwire.trace.frame import original_forward
from revwire.trace.graph import ancestors, between, dependents, rearranges, seen_through
from revwire.trace.tracer import updated

if TYPE_CHECKING:
    from collections.abc import Collection

    from revwire.trace.frame import Frame, Identity

_ADDITIONS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}


@dataclass(frozen=True, eq=False)
class Residual:
    """One residual addition of one frame's graph.

    Attributes:
        frame: The traced frame.
        index: Which of the frame's residuals, in running order; counts the refused ones too.
        skip: The node whose value is the trunk before the addition.
        total: The node of the (outermost) sum.
        terms: What is added to the skip, in order: the outputs of the branches. Of a scaled skip, all that is summed.
        inside: Nodes between `skip` and `total`: the branch.
        post: Elementwise operations after the sum that move into the branch, in order.
        following: All operations after the sum that could move in, norms too: what `post` is a beginning of.
        scale: Where the sum adds the trunk scaled (`s * x`), or puts it together from slices, the node that does; the
            branch is then all of it less the trunk, `s * x + F(x) - x`.
        block: Whether it is no addition but a child of an `nn.Sequential`, `G(x) - x`.
        refused: Why this residual cannot become a step, if it cannot.
    """

    frame: Frame
    index: int
    skip: fx.Node
    total: fx.Node
    terms: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    post: tuple[fx.Node, ...] = ()
    following: tuple[fx.Node, ...] = ()
    scale: fx.Node | None = None
    block: bool = False
    refused: str | None = None

    @property
    def parallel(self) -> bool:
        """Whether several branches are summed, which the rewritten code does in an order of its own."""
        return len(self.terms) > (1 if self.scale is None else 2)

    @property
    def leads(self) -> bool:
        """Whether the trunk is the first term of the sum; a sum has the memory layout of its first term."""
        first = self.total
        while first in self.sums:
            first = first.all_input_nodes[0]
        return seen_through(self.frame, first) is self.skip

    @property
    def post_name(self) -> str | None:
        """What moves into the branch after the sum, in words."""
        return " ".join(name_of(node) for node in self.post) or None

    def with_post(self, name: str | None) -> Residual | None:
        """The residual with as much moved in as makes up `name`, None if that is not what follows the sum."""
        beginnings = (self.following[:count] for count in range(len(self.following) + 1))
        candidates = (replace(self, post=post) for post in (self.post, *beginnings))
        return next((r for r in candidates if r.post_name == name), None)

    @property
    def result(self) -> fx.Node:
        """The node that carries the trunk on: the sum, or the last operation after it that moves in."""
        return self.post[-1] if self.post else self.total

    @property
    def entering(self) -> Identity:
        """The traced value of the trunk before the addition."""
        return id(self.skip.meta["value"]), self.skip.meta["version"]

    @property
    def leaving(self) -> Identity:
        """The traced value of the trunk after it."""
        return id(self.result.meta["value"]), self.result.meta["version"]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the children that its branch calls, and what moves into it."""
        called = (n for n in (*self.inside, *self.post) if n.op == "call_module")
        return tuple(dict.fromkeys(str(n.target) for n in called))

    @property
    def line(self) -> str:
        """`file.py:123` of the addition."""
        return str(self.total.meta.get("line", ""))

    @cached_property
    def sums(self) -> frozenset[fx.Node]:
        """The nodes that add up the terms and the skip, inner sums of parallel branches too."""
        ends = {*self.terms, self.skip}
        nodes: set[fx.Node] = set()
        waiting = [self.total]
        while waiting:
            node = waiting.pop()
            if node not in ends and node not in nodes:
                nodes.add(node)
                waiting.extend(node.all_input_nodes)
        return frozenset(nodes)

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """All nodes that become the step."""
        return frozenset((*self.inside, *self.post, *self.sums))

    @cached_property
    def shared(self) -> tuple[fx.Node, ...]:
        """Values of the branch that the frame uses elsewhere too (attention weights, a second output).

        The branch hands them out beside its sum. Shapes, and mere rearrangements of the trunk, are not among them: the
        frame reads those of its own trunk.
        """
        own = {*self.inside, *self.post, *self.sums}
        inner = (n for n in self.inside if n is not self.total and not own.issuperset(n.users))
        return tuple(n for n in inner if not self._read_again(n))

    def _read_again(self, node: fx.Node) -> bool:
        """Whether a branch node is computed from shapes and rearrangements of the trunk alone."""
        inside = set(self.inside)
        waiting = [node]
        while waiting:
            current = waiting.pop()
            has_tensors = any(isinstance(v, Tensor) for v in tree_leaves(current.meta.get("value")))
            if current.op == "call_module" or (has_tensors and not rearranges(current)):
                return False
            waiting.extend(n for n in current.all_input_nodes if n in inside)
        return True

    @cached_property
    def sides(self) -> tuple[fx.Node, ...]:
        """What the branch reads of its frame beside the trunk; the module's own attributes are not among them."""
        inside = {*self.inside, *self.post}
        read = (n for node in (*self.inside, *self.post) for n in node.all_input_nodes)
        known = {*inside, self.skip, self.total}
        return tuple(dict.fromkeys(n for n in read if n not in known and n.op != "get_attr"))


def name_of(node: fx.Node) -> str:
    """What a reader calls the operation of a node."""
    return getattr(node.target, "__name__", str(node.target))


def find_residuals(frame: Frame) -> tuple[list[Residual], list[str]]:
    """All residual additions of a traced frame, in running order, and reasons why some sums are none.

    Returns:
        The residuals (those with `refused` set cannot become steps), and the reasons in words.
    """
    assert frame.graph is not None
    found: list[Residual] = []
    reasons: list[str] = []
    inner: set[fx.Node] = set()
    additions = {node for node in frame.graph.nodes if _is_addition(node)}
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
        terms = _flatten(total, inner)
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
            r, index=i, post=_post_operations(r, skips), following=_elementwise_after(frame, r.total, skips)
        )
        for i, r in enumerate(found)
    ]
    return without_cycles(frame, [replace(r, refused=refusal(r)) for r in ordered]), reasons[::-1]


def find_blocks(frame: Frame) -> list[Residual]:
    """The children of an `nn.Sequential` that keep their input's shape, with the activations and norms after each."""
    assert frame.graph is not None
    # a subclass with a forward of its own is no mere sequence
    if getattr(original_forward(frame.module), "__func__", None) is not nn.Sequential.forward:
        return []
    found: list[Residual] = []
    joined: set[fx.Node] = set()
    for node in frame.graph.nodes:
        if node in joined or not _keeps_shape(frame, node):
            continue
        (skip,) = node.all_input_nodes
        inside = (node, *_elementwise_after(frame, node))
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


def _is_addition(node: fx.Node) -> bool:
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


def _flatten(total: fx.Node, inner: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The terms of a sum of sums; nested additions used nowhere else dissolve (and are added to `inner`)."""
    terms: list[fx.Node] = []
    for term in total.args:
        assert isinstance(term, fx.Node)
        if _is_addition(term) and len(term.users) == 1:
            inner.add(term)
            terms.extend(_flatten(term, inner))
        else:
            terms.append(term)
    return tuple(terms)


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


def _elementwise_after(frame: Frame, node: fx.Node, skips: Collection[fx.Node] = ()) -> tuple[fx.Node, ...]:
    """All elementwise operations and norms after `node`, as long as nothing else reads what is before them."""
    following: list[fx.Node] = []
    while len(node.users) == 1 and node not in skips:
        (user,) = node.users
        if not (is_elementwise(frame, user, node) or is_norm(frame, user, node)):
            break
        following.append(user)
        node = user
    return tuple(following)


def joined_arguments(frame: Frame) -> tuple[fx.Node, set[fx.Node]] | None:
    """Where a frame hands on the sum of one argument and of what it made of others: the one, and the others.

    `BertSelfOutput(hidden, input)` is `norm(dense(hidden) + input)`: a residual, but of the frame that calls it.
    """
    assert frame.graph is not None
    for total in frame.graph.nodes:
        if not _is_addition(total) or not _handed_on(total):
            continue
        terms = _flatten(total, set())
        for term in terms:
            skip, others = seen_through(frame, term), [t for t in terms if t is not term]
            if skip.op != "placeholder" or skip.meta["value"].shape != total.meta["value"].shape:
                continue
            sources = {n for n in ancestors(others) | set(others) if n.op == "placeholder"}
            sources = {n for n in sources if isinstance(n.meta["value"], Tensor)}
            if sources and skip not in sources:
                return skip, sources
    return None


def _handed_on(total: fx.Node) -> bool:
    """Whether a sum, at most normed, activated or the like, is the (first) tensor that its frame returns."""
    output = total.graph.output_node().all_input_nodes
    node = output[0] if output else None
    while node is not None and node is not total:
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("value"), Tensor)]
        node = sources[0] if len(sources) == 1 and node.op != "placeholder" else None
    return node is total
