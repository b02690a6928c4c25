"""How the steps of a rewired model run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Exact

Fallback = Literal["error", "original"]
"""What a call does that cannot be rewired: fail, or run the original forward, which is another function."""

Mode = Literal["reverse", "anchor", "keep"]
"""What a step holds for backward: nothing, the input of the step before it, or the graph of its branch."""


@dataclass(frozen=True)
class Options:
    """How the steps of a rewired model run.

    Attributes:
        coupling: The recurrence.
        replay: Drop what branches save and run them again in backward; False keeps everything, as plain autograd
            through the same recurrence does, for comparison.
        exact: Whether streams are in fixed point, and on which grid; True: each chain's follows what enters it.
        sliced: Run branches slice by slice where the plan says so; False runs them whole, for comparison.
        compile: Run branches by torch.compile; on fake tensors they run as they are.
        overlap: Start a step's second run while the device computes the gradients of the step after it
            (`revwire.experimental.overlap`).
        check: Compare a few numbers of every second run with those of the first.
        fallback: What a call of a rewired module does that cannot be traced.
    """

    coupling: Coupling
    replay: bool = True
    exact: Exact = False
    sliced: bool = True
    compile: bool = False
    overlap: bool = False
    check: bool = True
    fallback: Fallback = "error"
