"""A tensor that a chain keeps from forward to backward: checked to be unchanged, freed after its last use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revwire._torch import backward_pass, keeps_graph
from revwire.errors import ReplayError

if TYPE_CHECKING:
    from torch import Tensor


class Kept:
    """A tensor without history, and how often it had been changed in place when it was kept.

    Args:
        tensor: What is kept; its own history is not.
        step: What messages call the step that needs it.
        what: What messages call it: `"the output of its chain"`.
    """

    __slots__ = ("_step", "_tensor", "_version", "_what")

    def __init__(self, tensor: Tensor, step: str, what: str) -> None:
        self._tensor: Tensor | None = tensor.detach()
        self._version, self._step, self._what = tensor._version, step, what

    @property
    def tensor(self) -> Tensor | None:
        """What is kept, None if it was freed."""
        return self._tensor

    def check(self) -> Tensor:
        """The tensor, if it is there and as it was.

        Raises:
            ReplayError: it was freed by a backward before, or changed in place.
        """
        if self._tensor is None:
            raise ReplayError(
                f"{self._step}: {self._what} was freed by an earlier backward(); give that one retain_graph=True"
            )
        if self._tensor._version != self._version:
            raise ReplayError(
                f"{self._step}: {self._what} has been modified by an inplace operation, and backward needs it as it "
                "was; use the out-of-place form of that operation"
            )
        return self._tensor

    def take(self, *, last: bool) -> Tensor:
        """The tensor for one backward pass.

        Args:
            last: Whether no other step of this pass asks for it. It is freed then, unless the pass retains its graph,
                and what is returned is the only holder of its memory.

        Raises:
            ReplayError: as `check`.
        """
        tensor = self.check()
        if last and backward_pass() != -1 and not keeps_graph():
            self._tensor = None
            return tensor
        # another tensor object on the same memory: whoever gets it can tell that the memory is held here too
        return tensor.detach()
