"""Notices sums of an exact chain that are too large to be undone exactly, and has their steps keep their `x[i-1]`."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from revwire.run.kept import Kept


_LAG = {"cpu": 0}
_LAG_ELSEWHERE = 2  # steps a GPU may be ahead of the check, so that nothing waits for it; each holds a trunk


Anchor = Callable[["Kept"], None]
"""Has a step keep its input."""


class Watch:
    """Keeps the `x[i-1]` of a step whose sum was too large to be taken back exactly, and says so once.

    A GPU's answer is read when it is some steps further on, so that it never stands still for it.

    Args:
        chain: What the message calls the chain: the name of its first step.
    """

    __slots__ = ("_chain", "_told", "_waiting")

    def __init__(self, chain: str) -> None:
        self._chain, self._told = chain, False
        self._waiting: deque[tuple[str, weakref.WeakMethod[Anchor], Kept, Callable[[], bool]]] = deque()

    def step(self, name: str, anchor: Anchor, previous: Kept, holds: Tensor) -> None:
        """Note one step.

        Args:
            name: What messages call it.
            anchor: Method of what holds the step, to be called with `previous` if the sum was too large; the watch does
                not keep that alive.
            previous: Its `x[i-1]`.
            holds: Whether its sum is exact.
        """
        self._waiting.append((name, weakref.WeakMethod(anchor), previous, _on_host(holds)))
        self.settle(_LAG.get(holds.device.type, _LAG_ELSEWHERE))

    def settle(self, left: int = 0) -> None:
        """Look at all answers but the `left` last ones."""
        while len(self._waiting) > left:
            name, anchor_of, previous, held = self._waiting.popleft()
            if held() or (anchor := anchor_of()) is None:
                continue
            anchor(previous)
            if not self._told:
                self._told = True
                warnings.warn(
                    f"the chain from {self._chain}: values have left the range of its exact grid at {name}; such steps "
                    "keep their input, which costs memory and no gradient. A coarser grid holds larger values: "
                    "rewire(..., exact=revwire.Grid(bits)) with fewer bits",
                    stacklevel=2,
                )


def _on_host(flag: Tensor) -> Callable[[], bool]:
    """Reads a flag when it is asked for; until then the device that computes it goes on."""
    if flag.device.type == "cpu":
        return lambda: bool(flag)
    copy, event = flag.to("cpu", non_blocking=True), torch.get_device_module(flag.device).Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(copy)

    return read
