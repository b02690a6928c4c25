"""Reconstructs `x[i-1]` from `x[i]` and `x[i+1]`: all at once, or slice by slice as the branch runs again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from revwire._torch import solely_held
from revwire.run.recurrence import Weights

if TYPE_CHECKING:
    from torch import Tensor

    from revwire.run.slices import Slices


class Inverse(Protocol):
    """Takes a step back."""

    def retreat(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i-1]` from `x[i+1]`, `x[i]` and `F_i(x[i])`."""


class Reconstruction:
    """One step in one backward pass: what its branch runs again on, and `x[i-1]` as far as it is there.

    Args:
        current: `x[i]`.
        following: `x[i+1]`, None where `x[i-1]` is not to be reconstructed.
        inverse: Takes the step back.
        slices: How the branch is cut, None: it runs on all of the trunk.
        runs: How many runs of the branch there are.
        last: Whether no step of this pass asks for its states again.
        age: How many steps were taken back to get at `current`.

    Attributes:
        current: `x[i]`.
        last: As given.
        waiting: The runs of the branch that are still to come.
    """

    __slots__ = (
        "_following",
        "_inverse",
        "_out",
        "_overwrites",
        "_slices",
        "age",
        "current",
        "last",
        "waiting",
    )

    def __init__(
        self,
        current: Tensor,
        following: Tensor | None,
        inverse: Inverse | None,
        slices: Slices | None,
        runs: int,
        *,
        last: bool,
        age: int = 0,
    ) -> None:
        self.current, self._following, self.last, self.age = current, following, last, age
        self._inverse, self._slices = inverse, slices
        self.waiting = set(range(runs))
        # where nobody else needs x[i+1], x[i-1] takes its memory
        self._overwrites = following is not None and isinstance(inverse, Weights) and solely_held(following)
        self._out: Tensor | None = None

    def input_of(self, run: int) -> Tensor:
        """What one run of the branch reads of the trunk."""
        return self._slice(self.current, run)

    def add(self, run: int, out: Tensor | None) -> None:
        """Note that a run of the branch is done, and what it gave, where that was wanted."""
        self.waiting.discard(run)
        if out is None:
            return
        out = out.detach()
        if self._slices is None:
            self._out = out
        elif self._overwrites:
            self._retreat_slice(run, out)
        else:
            if self._out is None:
                self._out = torch.empty_like(self.current, dtype=out.dtype)
            self._slice(self._out, run).copy_(out)

    def previous(self) -> Tensor:
        """`x[i-1]`, when all runs of the branch are done."""
        assert self._following is not None
        if self._overwrites and self._slices is not None:
            return self._following
        assert self._out is not None
        assert self._inverse is not None
        if self._overwrites and isinstance(self._inverse, Weights):
            return self._inverse.retreat_(self._following, self.current, self._out)
        return self._inverse.retreat(self._following, self.current, self._out)

    def _retreat_slice(self, run: int, out: Tensor) -> None:
        assert isinstance(self._inverse, Weights)
        assert self._slices is not None
        assert self._following is not None
        # coefficients may be one per sample
        by_sample = self._slices.dim == 0
        weights = self._inverse.of_slice(run, self._slices.number) if by_sample else self._inverse
        with torch.no_grad():
            weights.retreat_(self._slice(self._following, run), self._slice(self.current, run), out)

    def _slice(self, whole: Tensor, run: int) -> Tensor:
        return whole if self._slices is None else self._slices.one(whole, run)
