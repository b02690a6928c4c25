"""One run of a residual branch that keeps nothing for backward, and the same run again when backward asks for it.

In forward the branch runs under saved-tensor hooks: each tensor that one of its operations would save is dropped, and
a `Ticket` is saved in its place. Run again with grad, on the same input and under the same conditions, it saves the
same tensors in the same order; they are what the tickets stood for.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire.errors import ReplayError
from revwire.pytree import is_object, snapshot, tree_leaves, tree_map
from revwire.run.ambient import no_weight_cache
from revwire.run.conditions import Conditions, observe
from revwire.run.sample import Sample, can_sample, epsilon

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from revwire.run.options import Mode
    from revwire.run.sample import Comparison
    from revwire.run.slices import Slices
    from revwire.run.state import Known


_Kind = tuple[torch.dtype, torch.Size]

BACKWARD_INSIDE = "it runs a backward pass of its own inside forward, which cannot be run again"


@dataclass(eq=False, slots=True)
class Branch:
    """One step's residual branch as a function of the trunk and its side inputs, and the modules it runs.

    Attributes:
        name: What messages call the step, such as `blocks.3#0`.
        function: `F(x, *sides)`.
        modules: The modules it calls.
        own: The parameters it reads itself, as (owner, name).
        slices: How it is run slice by slice, None: all at once.
        mode: What the step holds for backward.
        check: Whether the numbers of the second run are compared with those of the first.
        known: What the modules held when the step ran last.
    """

    name: str
    function: Callable[..., Any]
    modules: Sequence[nn.Module] = ()
    own: Sequence[tuple[nn.Module, str]] = ()
    slices: Slices | None = None
    mode: Mode = "reverse"
    check: bool = True
    known: Known | None = None


class Redeems(Protocol):
    """Who gets dropped tensors back."""

    def redeem(self, run: int, index: int) -> Tensor:
        """The `index`-th tensor that a run dropped."""


class Ticket:
    """Stands in the graph for a tensor that a branch would have saved: the `index`-th of one `run` of its `owner`."""

    __slots__ = ("__weakref__", "index", "owner", "run")

    def __init__(self, owner: Redeems, run: int, index: int) -> None:
        self.owner, self.run, self.index = owner, run, index


class BranchRun:
    """One run of a branch in forward, on one slice of the trunk or all of it.

    Attributes:
        branch: What ran.
        conditions: What it ran under.
        sides: Its side inputs, without history.
        strides: Those of its input.
    """

    __slots__ = (
        "_of_output",
        "_of_saved",
        "_side_versions",
        "_tickets",
        "_wants_grad",
        "branch",
        "conditions",
        "sides",
        "strides",
    )

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.conditions: Conditions | None = None
        self.sides: tuple[Any, ...] = ()
        self.strides: tuple[int, ...] = ()
        self._tickets: list[tuple[weakref.ref[Ticket], _Kind]] = []
        self._wants_grad = False
        self._side_versions: list[int] = []
        self._of_output: Sample | None = None
        self._of_saved: tuple[int, Sample] | None = None

    @property
    def silent(self) -> bool:
        """Whether nothing was dropped."""
        return not self._tickets

    @property
    def precision(self) -> float:
        """The epsilon of the lowest precision that its samples were computed in, 0 if it has none."""
        return max((sample.precision for sample in self._samples), default=0.0)

    def widen(self, precision: float) -> None:
        """Compare its samples as if they had been computed in this precision, where it is the lower one."""
        for sample in self._samples:
            sample.precision = max(sample.precision, precision)

    @property
    def _samples(self) -> list[Sample]:
        samples = (self._of_output, self._of_saved[1] if self._of_saved else None)
        return [sample for sample in samples if sample is not None]

    @property
    def sampled(self) -> list[Tensor]:
        """The few numbers that the second run is compared with."""
        return [sample.numbers for sample in self._samples]

    def forward(self, owner: Redeems, run: int, x: Tensor, sides: tuple[Any, ...], *, output: bool) -> Any:
        """The branch's output, with grad and with its saved tensors dropped.

        Args:
            owner: Who gets the tensors back.
            run: Which of its runs this is.
            x: The trunk, or a slice of it.
            sides: What the branch reads beside it.
            output: Whether the second run's output will be asked for.
        """
        self._wants_grad, self.strides = x.requires_grad, x.stride()
        self.sides = _without_history(sides)
        self._side_versions = _versions(sides)
        version = x._version
        precision = 0.0
        last: tuple[int, Tensor] | None = None

        def drop(tensor: Tensor) -> Tensor | Ticket:
            nonlocal precision, last
            if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):
                return tensor
            ticket = Ticket(owner, run, len(self._tickets))
            self._tickets.append((weakref.ref(ticket), (tensor.dtype, tensor.shape)))
            if tensor.is_floating_point():
                precision = max(precision, epsilon(tensor.dtype))
                # masks, tables and weights tell nothing of what the branch makes of its input
                if not output and tensor.grad_fn is not None and not isinstance(tensor._base, nn.Parameter):
                    last = ticket.index, tensor
            return ticket

        name, own = self.branch.name, self.branch.own
        seen = observe(name, self.branch.modules, own, x.device, self.branch.known)
        with no_weight_cache(), seen as self.conditions, saved_tensors_hooks(drop, _redeem):
            out = self.branch.function(x, *sides)
        if x._version != version:
            raise ReplayError(
                f"{name}: the branch changes its input in place, which would corrupt the stream; give it a "
                "clone, or leave the block out with rewire(..., exclude=...)"
            )
        if self.branch.check and self._tickets:
            self._sample(out, precision, last)
        last = None  # the graph holds the hook, and the hook this
        return out

    def _sample(self, out: Any, precision: float, last: tuple[int, Tensor] | None) -> None:
        """Note a few numbers, for the second run to be compared with."""
        if last is not None and can_sample(last[1]):
            # a second run that nobody asks for an output stops at the last tensor that it saves
            self._of_saved = last[0], Sample(last[1], self._precision(last[1], precision))
        elif isinstance(out, Tensor) and can_sample(out):
            self._of_output = Sample(out, self._precision(out, precision))

    def _precision(self, tensor: Tensor, of_saved: float) -> float:
        """The epsilon of the lowest precision that a tensor was computed in."""
        precision = max(of_saved, epsilon(tensor.dtype))
        if precision < epsilon(torch.float32):
            return precision
        assert self.conditions is not None
        return max(precision, self.conditions.float32.epsilon(tensor.device))

    def of_modules(self) -> list[Comparison]:
        """Numbers of what the modules hold, of before the forward and of now, before it is run again."""
        assert self.conditions is not None
        return self.conditions.compared(self.branch.name) if self.branch.check else []

    def again(
        self, current: Tensor, *, output: bool = True, amplified: float | None = 1.0
    ) -> tuple[Tensor | None, dict[int, Tensor], Comparison | None]:
        """The same run, with grad.

        Args:
            current: The input, of the values of then.
            output: Whether the output is needed; if not, the run stops at the last tensor that it saves.
            amplified: How many times the rounding in the input has grown, None in an exact chain.

        Returns:
            The output, None if it is not needed; the tensors that living tickets stand for, by index; and the numbers
            that tell whether it was the same run, if there are any.
        """
        count, tickets = 0, self._tickets
        saved: dict[int, Tensor] = {}
        compared: Comparison | None = None
        done = False
        # what is compared may be known by the output alone
        output = output or self._of_output is not None

        def collect(tensor: Tensor) -> Tensor | None:
            nonlocal count, compared, done
            if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):
                return tensor
            if count == len(tickets) or tickets[count][1] != (tensor.dtype, tensor.shape):
                raise self._unlike(count, tensor)
            if self._of_saved is not None and self._of_saved[0] == count:
                compared = self._of_saved[1].compared(self.branch.name, tensor, amplified)
            if tickets[count][0]() is not None:  # somebody still has it
                saved[count] = tensor.detach()
            count += 1
            if not output and count == len(tickets):
                done = True
                raise _Done
            return None

        try:
            with saved_tensors_hooks(collect, _no_backward):
                out = self._run(current, with_grad=True)
        except (_Done, RuntimeError):
            if not done:  # a script module makes another error of it
                raise
            return None, saved, compared
        if count != len(tickets):
            raise self._differs("saves fewer tensors")
        return out, saved, self._compared(out, amplified) if self._of_output else compared

    def _compared(self, out: Any, amplified: float | None) -> Comparison | None:
        if self._of_output is None:
            return None
        found, wanted = (out.dtype, out.shape), (self._of_output.dtype, self._of_output.shape)
        if found != wanted:
            raise self._differs(f"returns a {_said(found)} for a {_said(wanted)}")
        return self._of_output.compared(self.branch.name, out, amplified)

    def output_again(
        self, current: Tensor, amplified: float | None = 1.0
    ) -> tuple[Tensor, Comparison | None]:
        """The output of the same run, without grad, and the numbers that tell whether it was the same."""
        out = self._run(current, with_grad=False)
        return out, self._compared(out, amplified)

    def check_unchanged(self) -> None:
        """See to it that a run again runs on what the first one ran on.

        Raises:
            ReplayError: a weight, a buffer or a side input was changed in place since.
        """
        assert self.conditions is not None
        self.conditions.check_unchanged(self.branch.name)
        self._check_sides()

    def _check_sides(self) -> None:
        if _versions(self.sides) != self._side_versions:
            raise ReplayError(
                f"{self.branch.name}: what the branch reads beside the trunk (a mask, a table) was changed in place "
                "between forward and backward, so it cannot be run again as it ran; use the out-of-place form"
            )

    def _run(self, current: Tensor, *, with_grad: bool) -> Tensor:
        self._check_sides()
        x = _with_strides(current, self.strides).detach().requires_grad_(self._wants_grad)
        assert self.conditions is not None
        with torch.set_grad_enabled(with_grad):
            out: Tensor = self.conditions.run(
                self.branch.name, lambda: self.branch.function(x, *_without_history(self.sides))
            )
        return out

    def _unlike(self, index: int, tensor: Tensor) -> ReplayError:
        if index == len(self._tickets):
            return self._differs("saves more tensors")
        _, wanted = self._tickets[index]
        return self._differs(f"saves a {_said((tensor.dtype, tensor.shape))} for a {_said(wanted)}")

    def _differs(self, what: str) -> ReplayError:
        return ReplayError(
            f"{self.branch.name}: run again in backward, the branch {what} than in forward, {WHY}"
        )


WHY = (
    "so it is not the same run, and gradients would be wrong. What it depends on has changed since the forward in a "
    "way that could not be put back: a weight without a mark (.data, a fused optimizer's step), a global, an object "
    "or an adapter's setting that it reads, random numbers of a generator of its own, another thread. "
    "Call backward() before such a change"
)


def _said(kind: _Kind) -> str:
    return f"{kind[0]} {tuple(kind[1])}"


class _Done(Exception):
    pass


def _redeem(packed: Tensor | Ticket) -> Tensor:
    return packed.owner.redeem(packed.run, packed.index) if isinstance(packed, Ticket) else packed


def _no_backward(_: object) -> Tensor:
    raise ReplayError(
        f"a tensor that a branch made when it ran again was used in a backward. Either {BACKWARD_INSIDE}; or it has a "
        "side effect, such as a loss that it appends to a list, which happens twice: return it instead"
    )


def _without_history(sides: tuple[Any, ...]) -> tuple[Any, ...]:
    def detached(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().requires_grad_(leaf.requires_grad)
        # a KV cache that the branch adds to: each run finds it as the first one did
        return snapshot(leaf, detached) if is_object(leaf) else leaf

    return tuple(tree_map(detached, side) for side in sides)


def _versions(tree: Any) -> list[int]:
    """How often each tensor in a structure was changed in place."""
    return [leaf._version for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`tensor` laid out as its original was: another layout may take another kernel that saves other tensors."""
    if tensor.stride() == strides or 0 in strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
