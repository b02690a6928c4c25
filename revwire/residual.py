"""A frame's fx graph -> its residual additions.

A residual addition is a sum one of whose terms, the skip, all other terms depend on. Sums of several branches
(parallel blocks, `x + attn(x) + mlp(x)`) are one residual; `nn.Identity` on the skip is seen through. What looks like
a residual and cannot become a step is returned with its reason.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from revwire._torch import tree_leaves
from revwire.trace import Frame, Identity, original_forward

if TYPE_CHECKING:
    from collections.abc import Iterable

_ASSERT = torch._assert  # noqa: SLF001 - what traced code calls
_ADDITIONS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}


@dataclass(frozen=True, eq=False)
class Residual:
    """One residual addition of one frame's graph.

    Attributes:
        frame: The traced frame.
        index: Which of the frame's residuals, in running order; counts the refused ones too.
        skip: The node whose value is the trunk before the addition.
        total: The node of the (outermost) sum.
        terms: What is added to the skip, in order: the outputs of the branches.
        inside: Nodes between `skip` and `total`: the branch.
        post: Elementwise operations after the sum that move into the branch, in order.
        refused: Why this residual cannot become a step, if it cannot.
    """

    frame: Frame
    index: int
    skip: fx.Node
    total: fx.Node
    terms: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    post: tuple[fx.Node, ...] = ()
    refused: str | None = None

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

    @cached_property
    def sides(self) -> tuple[fx.Node, ...]:
        """What the branch reads of its frame beside the trunk; the module's own attributes are not among them."""
        inside = {*self.inside, *self.post}
        read = (n for node in (*self.inside, *self.post) for n in node.all_input_nodes)
        known = {*inside, self.skip, self.total}
        return tuple(dict.fromkeys(n for n in read if n not in known and n.op != "get_attr"))


def find_residuals(frame: Frame) -> tuple[list[Residual], list[str]]:
    """All residual additions of a traced frame, in running order, and reasons why some sums are none.

    Returns:
        The residuals (those with `refused` set cannot become steps), and the reasons in words.
    """
    assert frame.graph is not None
    found: list[Residual] = []
    reasons: list[str] = []
    inner: set[fx.Node] = set()
    for total in reversed(frame.graph.nodes):
        if not _is_addition(total) or total in inner:
            continue
        terms = _flatten(total, inner)
        skip = _skip_of(frame, terms)
        if skip is None:
            if reason := _near_miss(frame, total, terms):
                reasons.append(reason)
            continue
        branches = tuple(t for t in terms if _seen_through(frame, t) is not skip)
        inside = _between(skip, branches)
        found.append(Residual(frame, 0, skip, total, branches, inside))
    found.reverse()
    ordered = [_completed(residual, index, found) for index, residual in enumerate(found)]
    return ordered, reasons[::-1]


def _completed(residual: Residual, index: int, others: list[Residual]) -> Residual:
    skips = {other.skip for other in others}
    post = _post_operations(residual, skips)
    whole = Residual(
        residual.frame, index, residual.skip, residual.total, residual.terms, residual.inside, post
    )
    refused = _refusal(whole)
    return Residual(whole.frame, index, whole.skip, whole.total, whole.terms, whole.inside, post, refused)


def _is_addition(node: fx.Node) -> bool:
    if not isinstance(node.meta.get("value"), Tensor):
        return False
    if node.op == "call_method":
        return node.target in {"add", "add_", "__add__", "__radd__", "__iadd__"} and _two_terms(node)
    return node.op == "call_function" and node.target in _ADDITIONS and _two_terms(node)


def _two_terms(node: fx.Node) -> bool:
    return (
        len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) and isinstance(a.meta.get("value"), Tensor) for a in node.args)
    )


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
        source = _seen_through(frame, term)
        others = [t for t in terms if t is not term]
        shapes_agree = all(_broadcasts_into(o, source) for o in others)
        if shapes_agree and _dependents(source).issuperset(others):
            return source
    return None


def _broadcasts_into(term: fx.Node, trunk: fx.Node) -> bool:
    shape: torch.Size = trunk.meta["value"].shape
    try:
        return bool(torch.broadcast_shapes(term.meta["value"].shape, shape) == shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False


def _seen_through(frame: Frame, node: fx.Node) -> fx.Node:
    """The node whose value `node` passes on: behind `nn.Identity`, the identity's input."""
    while node.op == "call_module" and type(frame.module.get_submodule(str(node.target))) is nn.Identity:
        node = node.all_input_nodes[0]
    return node


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [i for n in nodes for i in n.all_input_nodes]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen


def _between(skip: fx.Node, ends: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Nodes that depend on the values of `skip` and that `ends` are or depend on, in graph order."""
    after = _dependents(skip)
    inside = after & (_ancestors(ends) | set(ends))
    inside |= {n for n in after if n.target is _ASSERT and inside.intersection(n.all_input_nodes)}
    return tuple(n for n in skip.graph.nodes if n in inside)


def _dependents(source: fx.Node) -> set[fx.Node]:
    """Nodes computed from the values of `source`; what only reads its shape is not among them."""
    seen: set[fx.Node] = set()
    waiting = [user for user in source.users if _carries_values(user)]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting.extend(node.users)
    return seen


def _carries_values(node: fx.Node) -> bool:
    return node.target is _ASSERT or any(isinstance(v, Tensor) for v in tree_leaves(node.meta.get("value")))


def _near_miss(frame: Frame, total: fx.Node, terms: tuple[fx.Node, ...]) -> str | None:
    """The reason, if a sum looks like a residual to a reader and is none."""
    shared = [
        n
        for n in _ancestors([terms[0]]) & _ancestors(terms[1:])
        if isinstance(n.meta.get("value"), Tensor) and n.op != "get_attr"
    ]
    for term in terms:
        others = [t for t in terms if t is not term]
        if _dependents(_seen_through(frame, term)).issuperset(others):
            shapes = " and ".join("x".join(map(str, t.meta["value"].shape)) for t in (term, *others))
            return f"the sum at {total.meta['line']} adds tensors of different shapes ({shapes})"
    if shared and any(t.op == "call_module" for t in terms):
        names = ", ".join(str(t.target) for t in terms if t.op == "call_module")
        return f"the sum at {total.meta['line']} adds no unchanged input: each of {names} changes it"
    return None


def _refusal(residual: Residual) -> str | None:
    where = f"the residual at {residual.line}"
    allowed = {*residual.inside, *residual.post, *residual.sums}
    if any(n.meta.get("stale") for n in (*residual.inside, residual.total, *residual.post)):
        return f"{where} changes a tensor in place (the trunk, or one of the branch) and goes on using its old name"
    for node in (
        *residual.inside,
        *(p for p in (residual.total, *residual.post) if p is not residual.result),
    ):
        outside = [user for user in node.users if user not in allowed]
        if outside and not _recomputable(node, residual):
            return f"{where} shares an inner value of its branch ({node.name}) with code outside of it"
    return None


def _recomputable(node: fx.Node, residual: Residual) -> bool:
    """Whether a branch node is a number (a shape) that can be read again outside, without the branch's tensors."""
    inside = set(residual.inside)
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current.meta.get("value"), Tensor):
            return False
        waiting.extend(n for n in current.all_input_nodes if n in inside)
    return True


def _post_operations(residual: Residual, skips: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Elementwise operations after the sum up to the next trunk: the ReLU of a post-activation block."""
    post: list[fx.Node] = []
    node = residual.total
    while len(node.users) == 1 and node not in skips:
        (user,) = node.users
        if not _is_elementwise(residual.frame, user, node):
            break
        post.append(user)
        node = user
    ends_frame = any(user.op == "output" for user in node.users)
    if not post or not (ends_frame or node in skips):
        return ()
    return tuple(post)


def _is_elementwise(frame: Frame, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is an activation or dropout on `source`, proven by trying.

    It acts on each element alone, so it commutes with any shuffle; and it does more than scale, or nothing at all.
    """
    if (
        node.op == "output"
        or node.all_input_nodes != [source]
        or not isinstance(node.meta.get("value"), Tensor)
    ):
        return False
    if node.meta["value"].shape != source.meta["value"].shape:
        return False
    call: Any
    if node.op == "call_module":
        module = copy.copy(frame.module.get_submodule(str(node.target)))
        module.training = False  # dropout acts on each element alone too, but would shuffle the proof
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return False
        call = original_forward(module)
    elif node.op == "call_function" and node.args and node.args[0] is source:
        call = _Rest(node.target, node.args[1:], node.kwargs)
    elif node.op == "call_method":
        call = _Rest(getattr(Tensor, str(node.target), None), node.args[1:], node.kwargs)
    else:
        return False
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 5, *(2 for _ in source.meta["value"].shape[2:]), generator=generator)
    shuffle = torch.randperm(sample.numel(), generator=generator)
    try:
        result = call(sample.clone())
        direct = result.flatten()[shuffle]
        shuffled = call(sample.flatten()[shuffle].reshape(sample.shape).clone()).flatten()
        # a scaled trunk is no activation: x + F(x) halved after each block is another network than F(x) halved
        scales = torch.equal(call(-2 * sample), -2 * result) and not torch.equal(result, sample)
    except Exception:  # noqa: BLE001 - whatever does not run on a plain tensor is no activation
        return False
    return bool(torch.equal(direct, shuffled)) and not scales


@dataclass(frozen=True)
class _Rest:
    """A recorded function with all but its first argument filled in."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: Tensor) -> Any:
        return self.function(tensor, *self.args, **self.kwargs)
