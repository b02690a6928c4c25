"""What modules hold, noted before a branch runs, and put back for as long as it runs again.

Noted are the contents of every container that a branch can change or depend on (`revwire.run.contents`), and its
tensors: by their in-place version, and those that no operator need announce a change of (buffers, tensors that are mere
attributes) by a copy too, which is kept only where the forward did change them.
"""

from __future__ import annotations

from contextlib import nullcontext
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import only_shapes, scripts_as_written, wraps_others
from revwire.errors import ReplayError
from revwire.run.ambient import RandomState, is_capturing, random_state
from revwire.run.containers import swap
from revwire.run.contents import Contents
from revwire.run.sample import Comparison

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager, ExitStack

    from revwire.run.contents import Held

_version, _requires_grad = attrgetter("_version"), attrgetter("requires_grad")
_storage, _bytes = methodcaller("untyped_storage"), methodcaller("nbytes")
_Patches = dict[int, dict[Any, Any]]


class Known:
    """What the modules of a step held when it ran last: nothing of it has to be looked at again while it is the same.

    Whoever runs the step holds it, so that it goes with the model.
    """

    __slots__ = ("contents",)

    def __init__(self) -> None:
        self.contents: Contents | None = None

    def now(self, modules: Sequence[nn.Module], own: Sequence[tuple[nn.Module, str]]) -> Contents:
        """What modules hold; the arguments are those of `Contents`."""
        if self.contents is not None and self.contents.is_of(modules, own):
            return self.contents
        contents = Contents(modules, own)
        self.contents = contents if contents.lasts else None
        return contents


class ModuleState:
    """What modules hold at the moment when this is made.

    Args:
        modules: The modules that a branch calls; their children are noted too.
        own: What the branch's code reads itself, as (owner, name).
        known: What they held last.

    Attributes:
        generators: The states of the random generators that they may draw from, but for torch's own.
    """

    __slots__ = (
        "_contents",
        "_copies",
        "_moved",
        "_requires_grad",
        "_scripted",
        "_sums",
        "_versions",
        "generators",
    )

    def __init__(
        self,
        modules: Sequence[nn.Module],
        own: Sequence[tuple[nn.Module, str]] = (),
        known: Known | None = None,
    ) -> None:
        self._contents = contents = Contents(modules, own) if known is None else known.now(modules, own)
        self._versions = [*map(_version, contents.tensors)]
        self._requires_grad = [*map(_requires_grad, contents.tensors)]
        self._sums = {i: _sum_of_bits(contents.tensors[i]) for i in contents.summed or ()}
        self._copies = {
            i: contents.tensors[i].detach().clone() for i in contents.copied if i not in self._sums
        }
        self._moved = set(contents.moving)
        self._scripted = [
            (b, b.detach().clone()) for m in contents.scripted for b in m.buffers(recurse=False)
        ]
        self.generators: list[RandomState] = [
            random_state(g) for g in (() if only_shapes() else contents.generators)
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that were noted."""
        return [tensor for tensor in self._contents.tensors if isinstance(tensor, nn.Parameter)]

    def scripts(self) -> AbstractContextManager[None]:
        """What both runs of a branch need where there are script modules in it."""
        return scripts_as_written() if self._contents.scripts else nullcontext()

    def settle(self, where: str) -> None:
        """Look at what the branch's forward, which is over, has changed.

        Raises:
            ReplayError: it changed a weight, which a second run would do once more.
        """
        tensors = self._contents.tensors
        if [*map(_version, tensors)] != self._versions:
            self._moved |= {i for i, was in enumerate(self._versions) if tensors[i]._version != was}
        first = self._contents.summed is None and self._contents.lasts and not is_capturing()
        silent = {i for i, was in self._copies.items() if _moved_silently(tensors[i], was, first=first)}
        self._moved |= silent
        if first:
            still = (i for i in self._contents.copied if i not in self._moved)
            self._contents.summed = [i for i in still if _is_summed(tensors[i])]
        for i in self._moved - self._copies.keys():
            raise ReplayError(
                f"{where}: the branch itself changes {self._held(i).name} in place in its forward, so it cannot be "
                "run again as it ran; change it outside of the forward (after optimizer.step()), or leave the "
                "block out (exclude=)"
            )
        self._copies = {i: was for i, was in self._copies.items() if i in self._moved}
        self._scripted = [(b, was) for b, was in self._scripted if not torch.equal(b, was)]
        self.generators = [state for state in self.generators if state.moved()]

    def compared(self, where: str) -> list[Comparison]:
        """What is not copied, before the forward and now, for whoever looks at numbers when the backward is over."""
        return [
            Comparison.of_sums(f"{where}, {self._held(i).name}", was, _sum_of_bits(self._contents.tensors[i]))
            for i, was in self._sums.items()
        ]

    def check(self, where: str) -> None:
        """See to it that all tensors can be put back.

        Raises:
            ReplayError: one was changed in place since the forward, or freed.
        """
        tensors = self._contents.tensors
        if [*map(_version, tensors)] != self._versions:
            for i, was in enumerate(self._versions):
                if i not in self._moved and tensors[i]._version != was:
                    raise ReplayError(
                        f"{where}: {self._held(i).name} was changed in place between forward and backward, so the "
                        "branch cannot be run again as it ran and its gradients would be wrong; call backward() before "
                        "optimizer.step() or any other update"
                    )
        if 0 not in map(_bytes, map(_storage, tensors)):
            return
        for i, tensor in enumerate(tensors):
            if not tensor.untyped_storage().nbytes() and tensor.numel() and not tensor.is_meta:
                raise ReplayError(
                    f"{where}: the memory of {self._held(i).name} was freed between forward and backward (a sharded "
                    "parameter outside of its own block?), so the branch cannot be run again"
                )

    def put_back(self, stack: ExitStack) -> None:
        """Make the modules what they were; leaving the stack makes them what they are now again."""
        contents = self._contents
        if contents.scripts:
            stack.enter_context(self.scripts())
        patches = self._patches(stack)
        if patches or not contents.there():
            contents.put_back(stack, patches)
        contents.take_off_hooks(stack)
        for norm in contents.normed:
            # in training they read no statistics, and move them: those of copies
            fresh = {k: None if b is None else b.clone() for k, b in norm._buffers.items()}
            swap(norm._buffers, fresh, stack)
        for buffer, was in self._scripted:
            # a script module's buffers cannot be others
            now = buffer.clone()
            buffer.copy_(was)
            stack.callback(buffer.copy_, now)

    def _patches(self, stack: ExitStack) -> _Patches:
        """The tensors that others stand in for, by the content that they are noted in, and their key there."""
        tensors = self._contents.tensors
        changed = self._moved
        if [*map(_requires_grad, tensors)] != self._requires_grad:
            changed = changed | {
                i for i, t in enumerate(tensors) if t.requires_grad is not self._requires_grad[i]
            }
        patches: _Patches = {}
        for i in changed:
            again, places = self._again(i), self._held(i).places
            for content, key in places:
                patches.setdefault(id(content), {})[key] = again
            if not places and not tensors[i].requires_grad:
                # in a tuple there is no place for another: its own numbers, and no version tells of it
                now = tensors[i].detach().clone()
                tensors[i].data.copy_(again)
                stack.callback(tensors[i].data.copy_, now)
        return patches

    def _again(self, i: int) -> Tensor:
        """What stands in for a tensor in the second run."""
        tensor, wanted = self._contents.tensors[i], self._requires_grad[i]
        if i in self._moved:
            return self._copies[i].clone().requires_grad_(wanted)
        # frozen or thawed since
        other = tensor.detach().requires_grad_(wanted)
        return nn.Parameter(other, wanted) if isinstance(tensor, nn.Parameter) else other

    def _held(self, i: int) -> Held:
        return self._contents.held[i]


def _is_summed(tensor: Tensor) -> bool:
    """Whether a sum takes the place of a copy, which on a GPU would be held: comparing it would wait for the device."""
    return _is_far(tensor) and tensor.is_contiguous() and not _is_opaque(tensor)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """One number that is another as soon as a bit of a tensor is."""
    numbers = tensor.detach().flatten()
    numbers = torch.view_as_real(numbers).flatten() if numbers.is_complex() else numbers
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    return numbers.view(width).sum()


def _is_far(tensor: Tensor) -> bool:
    return tensor.device.type not in {"cpu", "meta"}


def _is_opaque(tensor: Tensor) -> bool:
    return only_shapes() or wraps_others(tensor) or tensor.layout is not torch.strided


def _moved_silently(tensor: Tensor, was: Tensor, *, first: bool) -> bool:
    """Whether a tensor's numbers are others though no operator said so (`.data`, F.batch_norm)."""
    if _is_opaque(tensor):
        return False
    if _is_far(tensor) and not first:
        # comparing would wait for the device; a copy that is put back in vain does no harm
        return tensor.is_floating_point()
    return not torch.equal(was, tensor)
