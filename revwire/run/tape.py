"""The memory-free backward: what a chain remembers of a forward, and how backward gets the rest back.

    forward    x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])              ordinary autograd
    backward   x[i-1] = (x[i+1] - b * x[i] - c * F_i(x[i])) / a            needs F_i(x[i]) once more

In forward a step is ordinary autograd, except that its branch F_i runs under saved-tensor hooks: each tensor that an
operation of the branch would save for backward is dropped, and a `Ticket` is saved in its place. Nothing of the chain
stays but its last pair of streams. When backward redeems the first ticket of a branch, the branch runs once more, with
grad, on the input that the step after it has reconstructed; what that run saves serves all tickets of the branch, and
its output reconstructs the input of the step before. A branch that is cut into slices does so slice by slice; a step
with an `anchor` has kept the input of the step before, and needs no output. The gradients flow through the graph that
forward built, so hooks, taps, frozen parts, side inputs, `autograd.grad`, double backward and `retain_graph` are
autograd's own business.

Who holds whom decides whether graphs are freed: a graph holds tickets, a ticket its link, a link the link after it and
the last link the chain's last pair. Nothing holds an earlier step for a later one, and no tensor held here has a
history. What backward reconstructs belongs to one backward pass (`Pass`) and is gone when that pass ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import at_end_of_backward, backward_pass, keeps_graph, solely_held
from revwire.errors import ReplayError
from revwire.experimental.overlap import Ahead
from revwire.run.branch import BranchRun

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from revwire.run.branch import Branch
    from revwire.run.coupling import Weights
    from revwire.run.exact import Watch

Pair = tuple[Tensor, Tensor]
"""Two consecutive states of a chain, `(x[i-1], x[i])`, without history."""

Around = tuple[Tensor, Tensor | None]
"""`(x[i], x[i+1])` as the step between them needs it: without `x[i+1]` where it reconstructs nothing."""

Kept = tuple[Tensor, int]
"""A tensor without history, and how often it had been changed in place when it was kept."""


class Opened:
    """A step in the midst of being replayed: its slices run again one after the other.

    Attributes:
        current: `x[i]`.
        following: `x[i+1]`, where the step reconstructs `x[i-1]` from it.
        waiting: The slices that are still to run.
        last: Whether no later backward will ask for this step's pair again.
        own: Whether `following` is needed by no one else, so that `x[i-1]` may take its memory.
        out: The branch's output, as far as it is there; not used where slices become `x[i-1]` one by one.
    """

    __slots__ = ("current", "following", "last", "out", "own", "waiting")

    def __init__(self, around: Around, slices: int, *, last: bool, own: bool) -> None:
        self.current, self.following = around
        self.waiting = set(range(slices))
        self.last, self.own = last, own
        self.out: Tensor | None = None


class Pass:
    """What one backward pass has reconstructed so far, by the position of the link that did it.

    Attributes:
        below: The pair that a link's replay handed to the step before it.
        opened: The links some of whose slices have run again.
        saved: The tensors a slice's replay saved and that its tickets have not fetched yet, by link and slice.
        ahead: The links whose branch runs again on another stream, before a ticket asked for it.
    """

    __slots__ = ("ahead", "below", "opened", "saved")

    def __init__(self) -> None:
        self.below: dict[int, Pair] = {}
        self.opened: dict[int, Opened] = {}
        self.saved: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.ahead: dict[int, Ahead] = {}


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
        before: The step that this one continued from, while it lives.
        taken: Whether some step has continued from here; a second one has to enter anew.
        end: The states around this step while no other step has continued, with their in-place versions.
        bottom: No step before this one has anything to replay, so nothing needs to be reconstructed for it.
        anchored: Whether `x[i-1]` was kept, and is not reconstructed.
        anchor: It, with its in-place version, until a backward that does not retain the graph has used it.
        inverse: From `x[i+1]`, `x[i]` and `F_i(x[i])` to `x[i-1]`.
        weights: The coefficients, where the inverse is these alone, value by value.
        undo: Takes the pair back through the rearrangements between the step before and this one.
        runs: The runs of the branch that dropped their tensors: one, or one for each slice; none if it kept them.
    """

    def __init__(self, tape: Tape, position: int, branch: Branch, *, bottom: bool) -> None:
        self.tape, self.position, self.branch, self.bottom = tape, position, branch, bottom
        self.inverse: Callable[[Tensor, Tensor, Tensor], Tensor]
        self.weights: Weights | None = None
        self.next: Link | None = None
        self.before: weakref.ref[Link] | None = None
        self.taken = False
        self.end: tuple[Kept, Kept | None] | None = None
        self.anchored = False
        self.anchor: Kept | None = None
        self.undo: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.runs: list[BranchRun] = []

    @property
    def silent(self) -> bool:
        """Whether neither this step nor one before it dropped a tensor."""
        return self.bottom and all(run.silent for run in self.runs)

    def run(self, x: Tensor, sides: tuple[Any, ...], *, drop: bool) -> Tensor:
        """The branch in forward: its output with grad; what it saves is dropped or kept."""
        cut = self.branch.cut
        if cut is None:
            return self._run(x, sides, drop=drop)
        parts = zip(cut.of(x), cut.of_sides(sides), strict=False)
        return torch.cat([self._run(part, of_part, drop=drop) for part, of_part in parts], cut.dim)

    def _run(self, x: Tensor, sides: tuple[Any, ...], *, drop: bool) -> Tensor:
        out: Tensor
        if not drop:
            out = self.branch.function(x, *sides)
            return out
        self.runs.append(BranchRun(self.branch))
        out = self.runs[-1].forward(self, len(self.runs) - 1, x, sides)
        return out

    def keep(self, previous: Tensor) -> None:
        """Keep `x[i-1]`: it will not be reconstructed."""
        self.anchored, self.anchor = True, _kept(previous)

    def follow(self, before: Link | None, previous: Tensor, current: Tensor) -> None:
        """Become the end of the chain, with the states that backward starts from, in place of `before`."""
        if before is not None:
            before.next, before.end = self, None
        self.end = _kept(previous), _kept(current) if self._needs_output else None

    def redeem(self, part: int, index: int) -> Tensor:
        """The tensor that ticket `index` of slice `part` stands for, in the backward pass that asks for it."""
        now = self.tape.current()
        if self.tape.watch is not None:
            self.tape.watch.settle()
        if (self.position, part) not in now.saved:
            ahead = self.join_ahead(now)
            now.saved[self.position, part] = self._replay(now, part) if ahead is None else ahead.saved
            now.ahead.pop(self.position, None)
            below = None if self.before is None else self.before()
            if below is not None and backward_pass() != -1:
                below.run_ahead(now)
        try:
            return now.saved[self.position, part].pop(index)
        except KeyError:
            raise ReplayError(
                f"{self.branch.name}: a tensor saved in forward was fetched twice in one backward pass; an "
                "autograd.Function in the branch should read ctx.saved_tensors only once"
            ) from None

    def join_ahead(self, now: Pass) -> Ahead | None:
        """Wait for the branch's run ahead, if there is one."""
        if (ahead := now.ahead.get(self.position)) is not None:
            ahead.join()
            # a weight may have been updated meanwhile (an optimizer in a hook of its gradient)
            self.runs[0].check_unchanged()
        return ahead

    def run_ahead(self, now: Pass) -> None:
        """Run the branch again before a ticket asks for it: beside the gradients of the step after this one."""
        assert self.next is not None
        pair = now.below.get(self.next.position)
        whole = self.branch.cut is None and len(self.runs) == 1 and not self.runs[0].silent
        # an exact step takes what it is reconstructed from out of a store of its own; parameters of another class than
        # torch's (sharded ones) may do more than compute when they are used
        if pair is None or not self.branch.overlap or not whole or self.weights is None:
            return
        if not self.runs[0].plain_parameters:
            return
        if (self.position, 0) in now.saved or self.position in now.opened:
            return
        ahead = Ahead(pair[0].device, pair if self._needs_output else pair[:1])
        try:
            with ahead.running():
                ahead.saved = self._replay(now, 0)
        except ReplayError:
            # raised again when a ticket asks, if this backward asks for this step at all
            return
        now.ahead[self.position] = ahead

    def _replay(self, now: Pass, part: int) -> dict[int, Tensor]:
        """Run one slice of the branch once more; returns what it saves for the tickets."""
        if self.position not in now.opened:
            # steps whose branches saved nothing, or take no part in this backward, are stepped through
            above = [self]
            while (after := above[-1].next) is not None and after.position not in now.below:
                above.append(after)
            for link in reversed(above[1:]):
                link.step_through(now)
            self._open(now, last=True)
        opened = now.opened[self.position]
        out, saved = self.runs[part].again(self._slice(opened.current, part), output=self._needs_output)
        self._done(now, part, out)
        return saved

    def step_through(self, now: Pass) -> None:
        """Reconstruct the pair below, without what the tickets stand for."""
        opened = now.opened.get(self.position)
        if opened is None:
            opened = self._open(now, last=False)
        for part in sorted(opened.waiting):
            out = None
            if self._needs_output:
                out = self.runs[part].output_again(self._slice(opened.current, part))
            self._done(now, part, out)
        if not self.runs:
            self._close(now, opened)

    @property
    def _needs_output(self) -> bool:
        return not self.anchored and not self.bottom

    def _slice(self, whole: Tensor, part: int) -> Tensor:
        cut = self.branch.cut
        return whole if cut is None else cut.part(whole, part)

    def _open(self, now: Pass, *, last: bool) -> Opened:
        current, following = self._take(now, last=last)
        if not self._needs_output:
            following = None
        own = following is not None and self.weights is not None and solely_held(following)
        opened = now.opened[self.position] = Opened((current, following), len(self.runs), last=last, own=own)
        return opened

    def _done(self, now: Pass, part: int, out: Tensor | None) -> None:
        """Note that a slice has run again; after the last one the pair below is there."""
        opened = now.opened[self.position]
        opened.waiting.discard(part)
        if out is not None:
            out = out.detach()
            if self.branch.cut is None:
                opened.out = out
            elif opened.own:
                self._retreat_slice(opened, part, out)
            else:
                if opened.out is None:
                    opened.out = torch.empty_like(opened.current, dtype=out.dtype)
                self._slice(opened.out, part).copy_(out)
        if not opened.waiting:
            self._close(now, opened)

    def _retreat_slice(self, opened: Opened, part: int, out: Tensor) -> None:
        assert self.weights is not None
        assert self.branch.cut is not None
        assert opened.following is not None
        weights = (
            self.weights.of_slice(part, self.branch.cut.slices) if self.branch.cut.dim == 0 else self.weights
        )
        with torch.no_grad():
            weights.retreat_(self._slice(opened.following, part), self._slice(opened.current, part), out)

    def _close(self, now: Pass, opened: Opened) -> None:
        if self.bottom:
            now.opened.pop(self.position)
            return
        with torch.no_grad():
            pair = self._previous(opened), opened.current
            for undo in self.undo:
                pair = undo(pair[0]), undo(pair[1])
        # only now: where there is no pair to be had, whoever asks again is told so again
        now.opened.pop(self.position)
        now.below[self.position] = pair

    def _previous(self, opened: Opened) -> Tensor:
        """`x[i-1]`."""
        if self.anchored:
            if self.anchor is None:
                raise self._freed("the input")
            previous, version = self.anchor
            if previous._version != version:
                raise self._modified("the input")
            if opened.last and _frees_graph():
                self.anchor = None
            return previous.detach()
        assert opened.following is not None
        if opened.own and self.branch.cut is not None:
            return opened.following
        assert opened.out is not None
        retreat = self.weights.retreat_ if opened.own and self.weights is not None else self.inverse
        return retreat(opened.following, opened.current, opened.out)

    def _take(self, now: Pass, *, last: bool) -> Around:
        """`(x[i], x[i+1])`: from the step after this one, or from the end of the chain, if it is the `last` to ask."""
        if self.next is not None:
            self.next.join_ahead(now)
            return now.below.pop(self.next.position)
        if self.end is None:
            raise self._freed("the end")
        if any(kept is not None and kept[0]._version != kept[1] for kept in self.end):
            raise self._modified("the output")
        current, following = (None if kept is None else kept[0] for kept in self.end)
        assert current is not None
        if last and _frees_graph():
            self.end = None
            return current, following
        # others than these very tensors, so that whoever gets them knows that their memory is held here too
        return current.detach(), None if following is None else following.detach()

    def _freed(self, what: str) -> ReplayError:
        return ReplayError(
            f"{self.branch.name}: {what} of its chain was freed by an earlier backward(); give that one "
            "retain_graph=True"
        )

    def _modified(self, what: str) -> ReplayError:
        return ReplayError(
            f"{self.branch.name}: {what} of its chain has been modified by an inplace operation, and backward needs it "
            "as it was; use the out-of-place form of that operation"
        )


def _kept(tensor: Tensor) -> Kept:
    return tensor.detach(), tensor._version


def _frees_graph() -> bool:
    """Whether the backward pass that this thread runs frees what it has used."""
    return backward_pass() != -1 and not keeps_graph()
