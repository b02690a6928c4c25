"""A residual addition of one frame's graph, as data: its trunk, its branch, and what else it reads and hands out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, fx

from revwire.pytree import tree_leaves
from revwire.trace.graph import rearranges, seen_through
from revwire.trace.operation import name_of
from revwire.trace.passing import changes_dtype, passed_on

if TYPE_CHECKING:
    from revwire.trace.frame import Frame, Identity


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
        passing: What hands the skip on to the sum, and the sum on to `total`.
        added: The node that adds, where `total` is what hands its value on.
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
    passing: tuple[fx.Node, ...] = ()
    added: fx.Node | None = None
    block: bool = False
    refused: str | None = None

    @cached_property
    def looks(self) -> frozenset[str]:
        """What of the trunk it hangs on that `passing` hands values on and does no more: its shape, its dtype."""
        passed = (passed_on(node) for node in self.passing)
        return frozenset(each[1] for each in passed if each is not None and each[1] is not None)

    @property
    def casts(self) -> bool:
        """Whether the sum is in another dtype than the trunk before and after it."""
        return any(passed_on(node) is not None and changes_dtype(node) for node in self.passing)

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
        return str((self.added or self.total).meta.get("line", ""))

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
                # of a cast to another tensor's dtype, that tensor is no part of the sum
                waiting.extend(node.all_input_nodes[:1] if node in self.passing else node.all_input_nodes)
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
