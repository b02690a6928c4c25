"""A tensor that a module holds, as a branch's forward found it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revwire._torch import only_shapes, wraps_others
from revwire.errors import ReplayError


class Noted:
    """A tensor as a branch's forward found it, and the places (container, key) that it is noted at.

    Attributes:
        version: How often it had been changed in place.
        copy: Its numbers, where they may change without a word; None once it is known that they did not.
        moved: Whether the branch's own forward changed it, or others may without a word.
    """

    __slots__ = ("copy", "label", "moved", "places", "requires_grad", "tensor", "version")

    def __init__(self, tensor: Tensor, label: tuple[type, str], copy: Tensor | None) -> None:
        self.tensor, self.version, self.requires_grad = tensor, tensor._version, tensor.requires_grad
        self.label, self.copy, self.moved = label, copy, False
        self.places: list[tuple[Any, Any]] = []

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.label[0].__name__}.{self.label[1]}"

    def settle(self) -> None:
        """See whether the forward changed it, now that it is over."""
        self.moved |= self.tensor._version != self.version or (
            self.copy is not None and self._moved_silently()
        )
        if not self.moved:
            self.copy = None

    def _moved_silently(self) -> bool:
        """Whether its numbers are others though no operator said so (`.data`, F.batch_norm)."""
        assert self.copy is not None
        if only_shapes() or wraps_others(self.tensor) or self.tensor.layout is not torch.strided:
            return False
        if self.tensor.device.type != "cpu":
            # comparing would wait for the device; a copy that is put back in vain does no harm
            return self.tensor.is_floating_point()
        return not torch.equal(self.copy, self.tensor)

    def again(self) -> Tensor:
        """What stands in for it in the second run."""
        if self.moved:
            assert self.copy is not None
            return self.copy.clone().requires_grad_(self.requires_grad)
        if self.tensor.requires_grad is self.requires_grad:
            return self.tensor
        # frozen or thawed since
        other = self.tensor.detach().requires_grad_(self.requires_grad)
        return nn.Parameter(other, self.requires_grad) if isinstance(self.tensor, nn.Parameter) else other

    def check(self, where: str) -> None:
        """See to it that it can be put back.

        Raises:
            ReplayError: it was changed in place, or freed.
        """
        tensor = self.tensor
        if self.moved and self.copy is None:
            raise ReplayError(
                f"{where}: the branch itself changes {self.name} in place in its forward, so it cannot be run again as "
                "it ran; change it outside of the forward (after optimizer.step()), or leave the block out (exclude=)"
            )
        if not self.moved and tensor._version != self.version:
            raise ReplayError(
                f"{where}: {self.name} was changed in place between forward and backward, so the branch cannot be "
                "run again as it ran and its gradients would be wrong; call backward() before optimizer.step() or "
                "any other update"
            )
        if tensor.numel() and not tensor.is_meta and not tensor.untyped_storage().nbytes():
            raise ReplayError(
                f"{where}: the memory of {self.name} was freed between forward and backward (a sharded parameter "
                "outside of its own block?), so the branch cannot be run again"
            )
