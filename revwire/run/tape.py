"""The memory-free backward: what a chain remembers of a forward, and how backward gets the rest back.

    forward    x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])              ordinary autograd
    backward   x[i-1] = (x[i+1] - b * x[i] - c * F_i(x[i])) / a            needs F_i(x[i]) once more

In forward a step is ordinary autograd, except that its branch F_i runs under saved-tensor hooks: each tensor that an
operation of the branch would save for backward is dropped, and a `Ticket` is saved in its place. Nothing of the chain
stays but its last pair of states. When backward redeems the first ticket of a branch, the branch runs once more, with
grad, on the input that the step after it has reconstructed; what that run saves serves all tickets of the branch, and
its output reconstructs the input of the step before. A branch that is cut into slices does so slice by slice; a step
with an `anchor` has kept the input of the step before, and needs no output. The gradients flow through the graph that
forward built, so hooks, taps, frozen parts, side inputs, `autograd.grad`, double backward and `retain_graph` are
autograd's own business.

Who holds whom decides whether graphs are freed: a graph holds tickets, a ticket its link, a link the link after it and
the last link the chain's last pair. Nothing holds an earlier step for a later one, and no tensor held here has a
history. What backward reconstructs belongs to one backward pass (`Pass`) and is gone when that pass ends.

The words: a `Branch` is a function, a `BranchRun` one run of it in forward with its `Ticket`s, a `Link` one step of one
run of a chain, a `Tape` that run, a `Pass` one backward through it, a `Reconstruction` one link in one pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import at_end_of_backward, backward_pass
from revwire.errors import ReplayError
from revwire.run.branch import BACKWARD_INSIDE, WHY, BranchRun
from revwire.run.kept import Kept
from revwire.run.reconstruct import Reconstruction
from revwire.run.sample import differing

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from revwire.run.branch import Branch
    from revwire.run.reconstruct import Inverse
    from revwire.run.sample import Comparison
    from revwire.run.watch import Watch

Pair = tuple[Tensor, Tensor]
"""Two consecutive states of a chain, `(x[i-1], x[i])`, without history."""


class Pass:
    """What one backward pass has reconstructed so far, by the position of the link that did it.

    Attributes:
        alone: Whether somebody looks at one saved tensor, outside of any backward.
        pairs: What a link's second run handed to the step before it.
        opened: The links some of whose runs are done again, others not yet.
        saved: The tensors that a run saved again and that its tickets have not fetched yet, by link and run.
        ages: How many steps were taken back to get at a link's pair.
        compared: Numbers of both runs of each step, looked at when the pass ends.
    """

    __slots__ = ("__weakref__", "ages", "alone", "compared", "opened", "pairs", "saved")

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone
        self.pairs: dict[int, Pair] = {}
        self.opened: dict[int, Reconstruction] = {}
        self.saved: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.ages: dict[int, int] = {}
        self.compared: list[Comparison] = []

    def end(self) -> None:
        """See to it that all second runs were the first ones again.

        Raises:
            ReplayError: one gave other numbers.
        """
        for step, off in differing(self.compared):
            raise ReplayError(
                f"{step}: run again in backward, the branch gives other numbers than in forward ({off:.1g} of their "
                f"size apart), {WHY}. If nothing has changed, the branch makes more of the rounding in its "
                "reconstructed input than gradients bear (of tokens of zeros before a norm with a tiny eps): keep= the "
                "step, or exact=True, which reconstructs bit for bit. If it is meant to give others, exclude= the "
                "block; rewire(..., check=False) does not look"
            )


class Tape:
    """One run of a chain; its links share the passes of backward and the `watch`.

    Args:
        chain: Name of its first step.
        noise: How many times a step of the inverse amplifies rounding; None where it makes none, in an exact chain.

    Attributes:
        precision: The epsilon of the lowest precision that a branch of the chain ran in, where rounding grows.
    """

    __slots__ = ("chain", "noise", "passes", "precision", "watch")

    def __init__(self, chain: str, noise: float | None) -> None:
        self.chain, self.noise = chain, noise
        self.precision = 0.0
        self.passes: dict[int, Pass] = {}
        self.watch: Watch | None = None

    @property
    def amplifies(self) -> bool:
        """Whether the inverse makes rounding grow."""
        return self.noise is not None and self.noise > 1

    def current(self) -> Pass:
        """The pass for the backward that this thread runs; a throw-away one outside of any."""
        number = backward_pass()
        if number == -1:
            return Pass(alone=True)
        if number not in self.passes:
            passes = self.passes
            passes[number] = Pass()
            at_end_of_backward(lambda: passes.pop(number).end())
        return self.passes[number]


class Link:
    """One step of one run of a chain: what running its branch again and undoing it takes.

    Attributes:
        position: Place in the chain's run, from 0.
        next: The step that continued from here.
        before: The step that this one continued from, while it lives.
        taken: Whether some step has continued from here; a second one has to enter anew.
        end: `x[i]`, and `x[i+1]` where it is needed, while no other step has continued.
        bottom: No step before this one has anything to run again, so nothing needs to be reconstructed for it.
        anchor: `x[i-1]`, where it is kept and not reconstructed.
        inverse: Takes `x[i+1]`, `x[i]` and `F_i(x[i])` to `x[i-1]`.
        undo: Takes the pair back through the rearrangements between the step before and this one.
        runs: The runs of the branch that dropped their tensors: one, or one for each slice; none if it kept them.
    """

    def __init__(self, tape: Tape, position: int, branch: Branch, *, bottom: bool) -> None:
        self.tape, self.position, self.branch, self.bottom = tape, position, branch, bottom
        self.inverse: Inverse | None = None
        self.next: Link | None = None
        self.before: weakref.ref[Link] | None = None
        self.taken = False
        self.end: tuple[Kept, Kept | None] | None = None
        self.anchor: Kept | None = None
        self.undo: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.runs: list[BranchRun] = []

    # ---- forward

    @property
    def silent(self) -> bool:
        """Whether neither this step nor one before it dropped a tensor."""
        return self.bottom and all(run.silent for run in self.runs)

    @property
    def held(self) -> list[Tensor]:
        """The tensors that this link holds for backward."""
        kept = (self.anchor, *(self.end or ()))
        return [k.tensor for k in kept if k is not None and k.tensor is not None]

    def run(self, x: Tensor, sides: tuple[Any, ...], *, drop: bool) -> Tensor:
        """The branch in forward: its output with grad; what it saves is dropped or kept."""
        slices = self.branch.slices
        if slices is None:
            return self._run(x, sides, drop=drop)
        each = zip(slices.of(x), slices.of_sides(sides), strict=False)
        return torch.cat([self._run(own, own_sides, drop=drop) for own, own_sides in each], slices.dim)

    def _run(self, x: Tensor, sides: tuple[Any, ...], *, drop: bool) -> Tensor:
        out: Tensor
        if not drop:
            out = self.branch.function(x, *sides)
            return out
        self.runs.append(BranchRun(self.branch))
        out = self.runs[-1].forward(self, len(self.runs) - 1, x, sides, output=self._reconstructs)
        if self.tape.amplifies:
            self.tape.precision = max(self.tape.precision, self.runs[-1].precision)
        return out

    def input_kept(self, previous: Tensor) -> Kept:
        """`x[i-1]`, for an anchor."""
        return Kept(previous, self.branch.name, "the input of its chain")

    def keep_input(self, previous: Kept) -> None:
        """Have an anchor: `x[i-1]` will not be reconstructed."""
        self.anchor = previous

    def follow(self, before: Link | None, current: Tensor, following: Tensor) -> None:
        """Become the end of the chain, in place of `before`: backward starts from these states."""
        if before is not None:
            before.next, before.end = self, None
        name = self.branch.name
        after = Kept(following, name, "the output of its chain") if self._reconstructs else None
        self.end = Kept(current, name, "the output of its chain"), after

    # ---- backward

    def redeem(self, run: int, index: int) -> Tensor:
        """The tensor that ticket `index` of a run stands for, in the backward pass that asks for it."""
        tape = self.tape
        now = tape.passes.get(backward_pass()) or tape.current()
        if tape.watch is not None:
            tape.watch.settle()
        if (saved := now.saved.get((self.position, run))) is None:
            saved = now.saved[self.position, run] = self.run_again(now, run)
            if now.alone:
                now.end()
        try:
            return saved.pop(index)
        except KeyError:
            raise ReplayError(
                f"{self.branch.name}: a tensor saved in forward was fetched twice in one backward pass; an "
                "autograd.Function in the branch should read ctx.saved_tensors only once"
            ) from None

    def run_again(self, now: Pass, run: int) -> dict[int, Tensor]:
        """Run the branch, or one slice of it, once more; returns what it saves for the tickets."""
        if self.position not in now.opened:
            # steps whose branches saved nothing, or take no part in this backward, are stepped through
            above = [self]
            while (after := above[-1].next) is not None and after.position not in now.pairs:
                above.append(after)
            for link in reversed(above[1:]):
                link.step_through(now)
            self._open(now, last=True)
        opened = now.opened[self.position]
        x, amplified = opened.input_of(run), self._amplified(opened)
        now.compared += self.runs[run].of_modules()
        out, saved, compared = self.runs[run].again(x, output=self._reconstructs, amplified=amplified)
        if compared is not None:
            now.compared.append(compared)
        self._done(now, opened, run, out)
        return saved

    def step_through(self, now: Pass) -> None:
        """Reconstruct the pair below, without what the tickets stand for."""
        opened = now.opened.get(self.position) or self._open(now, last=False)
        for run in sorted(opened.waiting):
            out = None
            if self._reconstructs:
                now.compared += self.runs[run].of_modules()
                out, compared = self.runs[run].output_again(opened.input_of(run), self._amplified(opened))
                if compared is not None:
                    now.compared.append(compared)
            self._done(now, opened, run, out)
        if not self.runs:
            self._close(now, opened)

    def _amplified(self, opened: Reconstruction) -> float | None:
        """How many times the rounding in what a second run is given has grown; None where there is none."""
        noise = self.tape.noise
        return noise if noise is None or noise == 1 else math.exp(min(50.0, opened.age * math.log(noise)))

    @property
    def _reconstructs(self) -> bool:
        """Whether `x[i-1]` is made from the branch's output."""
        return self.anchor is None and not self.bottom

    def _open(self, now: Pass, *, last: bool) -> Reconstruction:
        age = 0 if self.next is None else now.ages.get(self.next.position, 0) + 1
        current, following = self.take(now, last=last)
        if not self._reconstructs:
            following = None
        opened = Reconstruction(
            current, following, self.inverse, self.branch.slices, len(self.runs), last=last, age=age
        )
        now.opened[self.position] = opened
        if self.tape.amplifies:
            # what the branches after this one were off by, each in its own precision, has come down to it and grown
            for run in self.runs:
                run.widen(self.tape.precision)
        return opened

    def _done(self, now: Pass, opened: Reconstruction, run: int, out: Tensor | None) -> None:
        """Note that a run is done again; after the last one the pair below is there."""
        opened.add(run, out)
        if not opened.waiting:
            self._close(now, opened)

    def _close(self, now: Pass, opened: Reconstruction) -> None:
        if not self.bottom:
            with torch.no_grad():
                # a later pass asks for the anchor again where this one retains its graph
                previous = opened.previous() if self.anchor is None else self.anchor.take(last=opened.last)
                pair = previous, opened.current
                for undo in self.undo:
                    pair = undo(pair[0]), undo(pair[1])
            now.pairs[self.position], now.ages[self.position] = pair, opened.age
        # only now: where there is no pair to be had, whoever asks again is told so again
        now.opened.pop(self.position)

    def take(self, now: Pass, *, last: bool) -> tuple[Tensor, Tensor | None]:
        """`(x[i], x[i+1])`: from the step after this one, or from the end of the chain, if it is the `last` to ask."""
        if self.next is not None:
            return now.pairs.pop(self.next.position)
        if self.end is None:
            raise ReplayError(f"{self.branch.name}: {BACKWARD_INSIDE}")
        for kept in self.end:
            if kept is not None:
                kept.check()
        current, following = self.end
        return current.take(last=last), None if following is None else following.take(last=last)
