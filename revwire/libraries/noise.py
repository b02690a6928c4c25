"""Random numbers, for example inputs and for proofs on a part of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Noise:
    """Random numbers from a generator of their own, made on the CPU.

    They are the same wherever a model lies and whatever `torch.set_default_device` says, and none of the process's
    generators moves.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, of the default dtype if none is given."""
        return torch.randn(tuple(shape), generator=self._generator, dtype=dtype, device="cpu")

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """Whole numbers from `low` to `high`, which is left out."""
        return torch.randint(low, high, tuple(shape), generator=self._generator, device="cpu")

    def permutation(self, count: int) -> Tensor:
        """The numbers below `count` in any order."""
        return torch.randperm(count, generator=self._generator, device="cpu")
