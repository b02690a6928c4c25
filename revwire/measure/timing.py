"""Seconds of several ways of doing a step, taken in turns."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from revwire.errors import RevwireError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median of the round-by-round ratios to `other`: a slow moment of the machine slows both alike."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def time_alternating(
    steps: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    *,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time several ways of doing a step, taking turns, so that a slow moment of the machine favours none.

    Every round runs each step once and begins with another one. Garbage is collected before each, outside the
    clock; on CUDA the clock waits for the device.

    Args:
        steps: What to time, by name.
        rounds: How many timed runs each step gets, at least 1.
        warmup: How many runs each gets before, not timed.
        progress: Called with the name of each step before it runs, warm-up included.

    Raises:
        RevwireError: There is no step, or no round.
    """
    if not steps or rounds < 1:
        raise RevwireError(f"timing needs at least one step and one round, found {len(steps)} and {rounds}")
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            progress(name)
            elapsed = _seconds(steps[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds(step: Callable[[], object]) -> float:
    gc.collect()
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    # asking whether CUDA is in use, rather than available, keeps a CPU measurement from starting a CUDA
    # context
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
