"""The memory-free backward: what a chain remembers of a forward, and how backward gets the rest back.

    forward    x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])              ordinary autograd
    backward   x[i-1] = (x[i+1] - b * x[i] - c * F_i(x[i])) / a            needs F_i(x[i]) once more

In forward a step is ordinary autograd, except that its branch F_i runs under saved-tensor hooks: each tensor that an
operation of the branch would save for backward is dropped, and a `Ticket` is saved in its place. Nothing of the chain
stays but its last pair of streams. When backward redeems the first ticket of a branch, the branch runs once more, with
grad, on the input that the step after it has reconstructed; what that run saves serves all tickets of the branch, and
its output reconstructs the input of the step before. The gradients flow through the graph that forward built, so
hooks, taps, frozen parts, side inputs, `autograd.grad`, double backward and `retain_graph` are autograd's own business.

Who holds whom decides whether graphs are freed: a graph holds tickets, a ticket its link, a link the link after it and
the last link the chain's last pair. Nothing points from a later step to an earlier one, and no tensor held here has a
history. What backward reconstructs belongs to one backward pass (`Pass`) and is gone when that pass ends.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._torch import at_end_of_backward, backward_pass, keeps_graph
from revwire.errors import ReplayError
from revwire.replay import Conditions, observe
from revwire.structure import is_object, snapshot, tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from revwire.fixed import Watch

Pair = tuple[Tensor, Tensor]
"""Two consecutive states of a chain, `(x[i-1], x[i])`, without history."""


@dataclass(eq=False, slots=True)
class Branch:
    """One step's residual branch as a function of the trunk and its side inputs, and the modules it runs.

    Attributes:
        name: What messages call the step, such as `blocks.3#0`.
        function: `F(x, *sides)`.
        modules: The modules it calls.
        own: The parameters it reads itself, as (owner, name).
    """

    name: str
    function: Callable[..., Tensor]
    modules: Sequence[nn.Module] = ()
    own: Sequence[tuple[nn.Module, str]] = ()


class Ticket:
    """Stands in the graph for a tensor that the branch would have saved: the `index`-th of its `link`."""

    __slots__ = ("__weakref__", "index", "link")

    def __init__(self, link: Link, index: int) -> None:
        self.link, self.index = link, index


class Pass:
    """What one backward pass has reconstructed so far, by the position of the link that did it.

    Attributes:
        below: The pair that a link's replay handed to the step before it.
        saved: The tensors a link's replay saved and that its tickets have not fetched yet.
    """

    __slots__ = ("below", "saved")

    def __init__(self) -> None:
        self.below: dict[int, Pair] = {}
        self.saved: dict[int, dict[int, Tensor]] = {}


class Tape:
    """One run of a chain that begins with step `chain`; its links share the passes of backward and the `watch`."""

    __slots__ = ("chain", "passes", "watch")

    def __init__(self, chain: str) -> None:
        self.chain = chain
        self.passes: dict[int, Pass] = {}
        self.watch: Watch | None = None

    def current(self) -> Pass:
        """The pass for the backward that this thread runs; a throw-away one outside of any."""
        number = backward_pass()
        if number == -1:
            return Pass()
        if number not in self.passes:
            passes = self.passes
            passes[number] = Pass()
            at_end_of_backward(lambda: passes.pop(number, None))
        return self.passes[number]


class Link:
    """One step of one run of a chain: what replaying and undoing it takes.

    Attributes:
        position: Place in the chain's run, from 0.
        next: The step that continued from here.
        taken: Whether some step has continued from here; a second one has to enter anew.
        end: The pair after this step while no other step has continued, with its in-place versions.
        bottom: No step before this one has anything to replay, so nothing needs to be reconstructed for it.
        inverse: From `x[i+1]`, `x[i]` and `F_i(x[i])` to `x[i-1]`.
        undo: Takes the pair back through the rearrangements between the step before and this one.
    """

    def __init__(self, tape: Tape, position: int, branch: Branch, *, bottom: bool) -> None:
        self.tape, self.position, self.branch, self.bottom = tape, position, branch, bottom
        self.inverse: Callable[[Tensor, Tensor, Tensor], Tensor]
        self.next: Link | None = None
        self.taken = False
        self.end: tuple[Pair, tuple[int, int]] | None = None
        self.undo: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.conditions: Conditions | None = None
        self.sides: tuple[Any, ...] = ()
        self.strides: tuple[int, ...] = ()
        self._tickets: list[tuple[weakref.ref[Ticket], torch.Size, torch.dtype]] = []
        self._wants_grad = False
        self._side_versions: list[int] = []

    @property
    def silent(self) -> bool:
        """Whether neither this step nor one before it dropped a tensor."""
        return self.bottom and not self._tickets

    def run(self, x: Tensor, sides: tuple[Any, ...]) -> Tensor:
        """The branch in forward: its output with grad, its saved tensors dropped."""
        self._wants_grad, self.strides = x.requires_grad, x.stride()
        self.sides = _without_history(sides)
        self._side_versions = _versions(sides)
        version = x._version
        seen = observe(self.branch.modules, self.branch.own, x.device)
        with seen as self.conditions, saved_tensors_hooks(self._drop, _redeem):
            out = self.branch.function(x, *sides)
        if x._version != version:
            raise ReplayError(
                f"{self.branch.name}: the branch changes its input in place, which would corrupt the stream; give it a "
                "clone, or leave the block out with rewire(..., exclude=...)"
            )
        return out

    def follow(self, before: Link | None, previous: Tensor, current: Tensor) -> None:
        """Become the end of the chain, with the pair that backward starts from, in place of `before`."""
        if before is not None:
            before.next, before.end = self, None
        self.end = (previous.detach(), current.detach()), (previous._version, current._version)

    def _drop(self, tensor: Tensor) -> Tensor | Ticket:
        if isinstance(tensor, nn.Parameter):
            return tensor
        ticket = Ticket(self, len(self._tickets))
        self._tickets.append((weakref.ref(ticket), tensor.shape, tensor.dtype))
        return ticket

    def redeem(self, index: int) -> Tensor:
        """The tensor that ticket `index` stands for, in the backward pass that asks for it."""
        now = self.tape.current()
        if self.tape.watch is not None:
            self.tape.watch.settle()
        if self.position not in now.saved:
            # steps whose branches saved nothing, or take no part in this backward, are stepped through
            to_replay = [self]
            while (above := to_replay[-1].next) is not None and above.position not in now.below:
                to_replay.append(above)
            for link in reversed(to_replay):
                link.replay(now, keep=link is self)
        try:
            return now.saved[self.position].pop(index)
        except KeyError:
            raise ReplayError(
                f"{self.branch.name}: a tensor saved in forward was fetched twice in one backward pass; an "
                "autograd.Function in the branch should read ctx.saved_tensors only once"
            ) from None

    def replay(self, now: Pass, *, keep: bool) -> None:
        """Run the branch once more and reconstruct the pair below; `keep` what it saves for the tickets."""
        if _versions(self.sides) != self._side_versions:
            raise ReplayError(
                f"{self.branch.name}: what the branch reads beside the trunk (a mask, a table) was changed in place "
                "between forward and backward, so it cannot be run again as it ran; use the out-of-place form"
            )
        current, following = self._take(now, keep=keep)
        x = _with_strides(current, self.strides).detach().requires_grad_(self._wants_grad)
        saved: dict[int, Tensor] = {}
        assert self.conditions is not None
        with self.conditions.restored(self.branch.name), torch.set_grad_enabled(keep):
            out = self._rerun(x, saved) if keep else self.branch.function(x, *_without_history(self.sides))
        if keep:
            now.saved[self.position] = saved
        if out is None:
            return
        with torch.no_grad():
            pair = self.inverse(following, current, out.detach()), current
            for undo in self.undo:
                pair = undo(pair[0]), undo(pair[1])
        now.below[self.position] = pair

    def _rerun(self, x: Tensor, saved: dict[int, Tensor]) -> Tensor | None:
        """Run the branch with grad and collect what it saves; None where its output is not needed any more."""
        count = 0

        def collect(tensor: Tensor) -> Tensor | None:
            nonlocal count
            if isinstance(tensor, nn.Parameter):
                return tensor
            if count == len(self._tickets):
                raise self._differs("saves more tensors")
            ticket, shape, dtype = self._tickets[count]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise self._differs(
                    f"saves a {tensor.dtype} {tuple(tensor.shape)} for a {dtype} {tuple(shape)}"
                )
            if ticket() is not None:
                saved[count] = tensor.detach()
            count += 1
            if self.bottom and count == len(self._tickets):
                raise _Done
            return None

        sides = _without_history(self.sides)
        try:
            with saved_tensors_hooks(collect, _no_backward):
                out = self.branch.function(x, *sides)
        except _Done:
            return None
        if count != len(self._tickets):
            raise self._differs("saves fewer tensors")
        return out

    def _take(self, now: Pass, *, keep: bool) -> Pair:
        """`(x[i], x[i+1])`: from the step after this one, or from the end of the chain."""
        if self.next is not None:
            return now.below.pop(self.next.position)
        if self.end is None:
            raise ReplayError(
                f"{self.branch.name}: the end of its chain was freed by an earlier backward(); "
                "give that one retain_graph=True"
            )
        pair, versions = self.end
        if tuple(t._version for t in pair) != versions:
            raise ReplayError(
                f"{self.branch.name}: the output of its chain has been modified by an inplace operation, and backward "
                "needs it as it was; use the out-of-place form of that operation"
            )
        if keep and backward_pass() != -1 and not keeps_graph():
            self.end = None
        return pair

    def _differs(self, what: str) -> ReplayError:
        return ReplayError(
            f"{self.branch.name}: run again in backward, the branch {what} than in forward, so it is not the same "
            "run; does it depend on global state, or on random numbers of a generator of its own?"
        )


class _Done(Exception):
    pass


def _redeem(packed: Tensor | Ticket) -> Tensor:
    return packed.link.redeem(packed.index) if isinstance(packed, Ticket) else packed


def _no_backward(_: object) -> Tensor:
    raise ReplayError("a branch runs a backward pass of its own inside forward, which cannot be run again")


def _without_history(sides: tuple[Any, ...]) -> tuple[Any, ...]:
    def detached(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().requires_grad_(leaf.requires_grad)
        # a KV cache that the branch adds to: each run finds it as the first one did
        return snapshot(leaf, detached) if is_object(leaf) else leaf

    return tuple(tree_map(detached, side) for side in sides)


def _versions(sides: tuple[Any, ...]) -> list[int]:
    return [leaf._version for leaf in tree_leaves(sides) if isinstance(leaf, Tensor)]


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`tensor` laid out as its original was: another layout may take another kernel that saves other tensors."""
    if tensor.stride() == strides or 0 in strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
