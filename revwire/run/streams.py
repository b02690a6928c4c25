"""What travels between rewired blocks: two streams that look like one tensor.

A rewired block hands the next one a `Streams`. Code in between that only rearranges (reshape, permute, ...) acts on
both streams, and the chain goes on. Code that does anything else gets the merged tensor, and leaves the chain.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import backward_pass, register_pytree_node
from revwire.errors import RewireError
from revwire.pytree import tree_leaves, tree_map
from revwire.run.exact import Grid, dropped_bits
from revwire.run.pieces import Piece, Whole, slices_of
from revwire.run.rearrange import inverse, is_rearrangement
from revwire.run.recurrence import promoted
from revwire.run.tape import Link, Tape
from revwire.run.travelling import as_tensor, is_travelling
from revwire.run.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from revwire.run.branch import Branch
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Exact
    from revwire.run.recurrence import Weights


_COPYING = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
_OF_ONE_GRADIENT = {Tensor.register_hook, Tensor.retain_grad}


class Place:
    """Where in which chain a pair of streams stands; the attributes are those of `Streams`.

    No dataclass: who maps the tensors of a dataclass (FSDP2's casts) makes all dataclasses in it again, field by field,
    which a coupling, whose fields follow from one another, does not allow.
    """

    __slots__ = ("coupling", "cut", "dtype", "grid", "link", "undo")

    def __init__(
        self,
        coupling: Coupling,
        dtype: torch.dtype,
        link: Link | None = None,
        undo: tuple[Callable[[Tensor], Tensor], ...] = (),
        grid: Grid | None = None,
        *,
        cut: bool = False,
    ) -> None:
        self.coupling, self.dtype, self.link, self.undo, self.grid = coupling, dtype, link, undo, grid
        self.cut = cut


@dataclass(eq=False, repr=False)
class Streams(Whole):
    """Two consecutive states of a chain, `x[i-1]` and `x[i]`, and the place in the chain they stand at.

    Behaves as the merged tensor (`tensor()`) wherever code expects a tensor.

    Attributes:
        previous: `x[i-1]`, at least float32.
        current: `x[i]`, of the same shape, dtype and strides.
        place: What follows, as one argument.
        coupling: The recurrence both belong to.
        grid: The grid both lie on, where the chain is exact.
        dtype: What the trunk of the network as it was would have here; branches and the merged tensor get it.
        link: The step that made them, None at the entry of a chain.
        undo: Takes both back through the rearrangements made since that step, the last one first.

    A dataclass, and a pytree node, because that is how FSDP2 finds the tensors of a module's inputs and outputs.
    """

    previous: Tensor
    current: Tensor
    place: Place

    # no fields: whoever maps the tensors of a dataclass (FSDP) makes another one of its fields
    def __post_init__(self) -> None:
        self.coupling, self.dtype, self.grid = self.place.coupling, self.place.dtype, self.place.grid
        self.link, self.undo = self.place.link, self.place.undo
        self._merged: Tensor | None = None
        self._detached = False
        self._made_with_grad = torch.is_grad_enabled()
        self._views: list[tuple[Tensor, int]] = []

    @classmethod
    def enter(cls, x: Tensor, coupling: Coupling, exact: Exact = False) -> Streams:
        """Start a chain from the tensor `x`, in fixed point if `exact`."""
        wide = x.to(promoted(x.dtype, torch.float32))
        if 0 in wide.stride():
            # expanded: what is reconstructed is not, and kernels would save other tensors of it
            wide = wide.contiguous()
        if exact is False:
            return cls(*coupling.enter(wide), Place(coupling, x.dtype))
        grid = exact if isinstance(exact, Grid) else Grid.around(wide)
        return cls(*coupling.enter(grid.round(wide)), Place(coupling, x.dtype, grid=grid))

    def tensor(self) -> Tensor:
        """The merged tensor, made once."""
        self.check_usable()  # also where it is made already: a view of it may have been changed since
        if self._merged is None:
            # the first use may be one without grad or in inference mode, the next one not
            with torch.inference_mode(False), torch.set_grad_enabled(self.requires_grad):
                self._merged = self.merger()(self.previous, self.current)
                if self._merged.is_inference():
                    self._merged = self._merged.clone()
            self._views.append((self._merged, self._merged._version))
        return self._merged

    def merger(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What makes one tensor of such a pair; it holds neither."""
        coupling, dtype = self.coupling, self.dtype
        return lambda previous, current: coupling.leave(previous, current).to(dtype)

    @property
    def left(self) -> bool:
        """Whether the merged tensor was changed in place: from then on it is the trunk, and the streams are history."""
        return self._detached or any(t is self._merged and t._version != made for t, made in self._views)

    def check_usable(self) -> None:
        """Raise where going on would be silently wrong.

        Raises:
            RewireError: the message says what to do instead.
        """
        if any(t is not self._merged and t._version != made for t, made in self._views):
            raise RewireError(
                "the trunk between two rewired blocks was changed in place through a view of it (reshape), which "
                "its streams cannot follow; use the out-of-place form, or exclude one of the blocks"
            )
        graph_stays_behind = self.requires_grad and self._made_with_grad and not torch.is_grad_enabled()
        if graph_stays_behind and (name := _function_running()):
            raise RewireError(
                f"{name}, an autograd.Function, was given the streams that travel between rewired blocks; autograd "
                "does not see them, so no gradient would come back: call it on x.tensor() instead of x"
                + (", or checkpoint with use_reentrant=False" if name == "CheckpointFunction" else "")
            )

    def advance(
        self,
        branch: Branch,
        sides: tuple[Any, ...] = (),
        *,
        replay: bool = True,
        link_type: type[Link] = Link,
    ) -> Streams:
        """One step of the chain: the streams after `branch`.

        Args:
            branch: What the step adds.
            sides: What the branch reads beside the trunk.
            replay: Whether to drop what the branch saves and run it again in backward; else that is kept.
            link_type: What notes the step on the tape.

        Raises:
            RewireError: the streams were changed in a way that would make the step silently wrong.
        """
        if self.current.dtype != promoted(self.current.dtype, torch.float32):
            raise RewireError(
                f"{branch.name}: the streams between rewired blocks were cast to {self.current.dtype}, which "
                "loses what backward reconstructs from; with FSDP2 give blocks a MixedPrecisionPolicy with "
                "cast_forward_inputs=False and no output_dtype"
            )
        self.check_usable()
        link = self._link(branch, link_type)
        wide, narrow = self.current.dtype, self.dtype
        if wide != narrow:
            function = branch.function
            branch = replace(branch, function=lambda x, *rest: function(x.to(narrow), *rest))
            link.branch = branch
        weights = self.coupling.weights(self.current, first=self.link is None)
        # a step without grad in the midst of a chain with grad is replayed too, on the way to the steps before it
        replay = replay and (torch.is_grad_enabled() or not link.bottom)
        if replay and not link.bottom and branch.mode != "reverse":
            link.keep_input(link.input_kept(self.previous))
        out = link.run(self.current, sides, drop=replay and branch.mode != "keep")
        following = self._next(link, weights, out)
        # only now: a branch that raises leaves these streams as they were, for whoever catches it to go on with
        before = None if self._again else self.link
        if before is not None:
            before.taken = True
        if not (torch.is_inference_mode_enabled() or torch.compiler.is_exporting()):
            link.follow(before, self.current, following)
        after = promoted(narrow, out.dtype)
        return Streams(self.current, following, Place(self.coupling, after, link, grid=self.grid))

    def _next(self, link: Link, weights: Weights, out: Tensor) -> Tensor:
        """`x[i+1]`; the link is told how to take it back."""
        if self.grid is None:
            link.inverse = weights
            return weights.advance(self.previous, self.current, out)
        # nothing below the first step with a ticket is ever reconstructed
        keep, dropped = not link.bottom and link.anchor is None, dropped_bits(self.coupling)
        pair = self.previous, self.current
        following, link.inverse = self.grid.advance(weights, dropped, *pair, out, keep=keep)
        if keep:
            if link.tape.watch is None:
                link.tape.watch = Watch(link.tape.chain)
            link.tape.watch.step(
                link.branch.name, link.keep_input, link.input_kept(self.previous), self.grid.holds(following)
            )
        return following

    def can_continue(self, coupling: Coupling, exact: Exact = False) -> bool:
        """Whether a step may go on from here; else the chain is left, and the step starts another one."""
        if coupling != self.coupling or (self.grid is not None) != (exact is not False):
            return False
        if isinstance(exact, Grid) and exact != self.grid:
            return False
        return not self.left and (self.link is None or not self.link.taken or self._again)

    @property
    def _again(self) -> bool:
        """Whether a step that goes on from here did so before, and a checkpoint around it runs it again in backward."""
        return self.link is not None and self.link.taken and backward_pass() != -1

    def _tape(self, chain: str) -> Tape:
        return Tape(chain, self.coupling.noise if self.grid is None else None)

    def _link(self, branch: Branch, link_type: type[Link]) -> Link:
        before = self.link
        # what a checkpoint runs again is looked at by it, and no part of the chain that the forward built
        if before is None or self._again:
            return link_type(self._tape(branch.name), 0, branch, bottom=True)
        link = link_type(before.tape, before.position + 1, branch, bottom=before.silent)
        link.before = weakref.ref(before)
        link.undo = self.undo
        return link

    def _call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.check_usable()
        alone = args and args[0] is self and not self.left and not _any_travels((args[1:], kwargs))
        if alone and is_rearrangement(function, args, kwargs):
            undo = inverse(function, self.current.shape, args[1:], kwargs)
            # the streams need not have the strides of the trunk that the code was written for
            free = _COPYING.get(function, function)
            both = [free(t, *args[1:], **kwargs) for t in (self.previous, self.current)]
            undos, cut = (undo, *self.undo), self.place.cut
            place = Place(self.coupling, self.dtype, self.link, undos, self.grid, cut=cut)
            moved = Streams(both[0], both[1], place)
            moved._views = self._views
            return moved
        if alone and self.place.cut and (cuts := slices_of(function, self.shape, args[1:], kwargs)):
            return (
                tuple(Piece(self, where) for where in cuts) if isinstance(cuts, list) else Piece(self, cuts)
            )
        return self.settled_call(function, args, kwargs)

    def settled_call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)` on the merged tensor.

        Raises:
            RewireError: it would be silently wrong on that.
        """
        if function in _OF_ONE_GRADIENT and not self.left:
            raise RewireError(
                f"{function.__name__} on the trunk between two rewired blocks: the gradient there belongs to two "
                "streams, not to one tensor; exclude one of the blocks, and the trunk between them is a tensor"
            )
        args, kwargs = settle((args, kwargs))
        result = function(*args, **kwargs)
        self._detached |= function is Tensor.detach_
        return result

    @property
    def requires_grad(self) -> bool:
        """Whether autograd records what is done with it."""
        return self.previous.requires_grad or self.current.requires_grad

    def __repr__(self) -> str:
        return f"Streams({tuple(self.shape)}, {self.dtype}, {self.coupling.name}; .tensor() is the merged tensor)"


def _function_running() -> str:
    """Name of the autograd.Function whose forward this code runs in, if any."""
    names, classes = dict[Any, str](), [torch.autograd.Function]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        names[getattr(inspect.unwrap(cls.forward), "__code__", None)] = cls.__name__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in names:
            return names[frame.f_code]
        frame = frame.f_back
    return ""


def settle(tree: Any) -> Any:
    """A structure with the merged tensor for all that travels in its place; the same object where there is none."""
    return tree_map(as_tensor, tree, is_leaf=is_travelling) if _any_travels(tree) else tree


def _any_travels(tree: Any) -> bool:
    return any(map(is_travelling, tree_leaves(tree, is_leaf=is_travelling)))


def _flatten(streams: Streams) -> tuple[list[Tensor], Place]:
    return [streams.previous, streams.current], streams.place


def _unflatten(tensors: Any, place: Place) -> Streams:
    previous, current = tensors
    return Streams(previous, current, place)


register_pytree_node(Streams, _flatten, _unflatten, serialized_type_name="revwire.Streams")
