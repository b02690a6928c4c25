"""The two-step recurrence over two streams, and its named coefficient sets.

    x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])          inverse: x[i-1] = (x[i+1] - b*x[i] - c*F_i(x[i])) / a

Every published way of making a residual network reversible without new parameters is one choice of (a, b, c), of what
enters a chain and of what leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from revwire.errors import RewireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Coupling:
    """One choice of coefficients; subclasses say what enters and what leaves a chain.

    Attributes:
        a: Weight of the stream before the last, `x[i-1]`; 0 makes the recurrence irreversible.
        b: Weight of the last stream, `x[i]`.
        c: Weight of the branch's output, `F_i(x[i])`.
    """

    a: float
    b: float
    c: float

    @property
    def name(self) -> str:
        """The name `rewire(coupling=...)` knows it by."""
        return type(self).__name__.lower()

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(x[-1], x[0])` of a chain that is given `x`."""
        return x, x

    def leave(self, previous: Tensor, current: Tensor) -> Tensor:  # noqa: ARG002 - others use both
        """The one tensor that the rest of the network sees of `(x[i-1], x[i])`."""
        return current

    def advance(self, previous: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i+1]` from `x[i-1]`, `x[i]` and `F_i(x[i])`."""
        # streams come first: the sum takes the layout of its first operand, and a trunk keeps its layout
        change = branch if self.c == 1 else self.c * branch
        if self.b:
            current = current if self.b == 1 else self.b * current
            change = current + change
        return change if not self.a else (previous if self.a == 1 else self.a * previous) + change

    def retreat(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """`x[i-1]` from `x[i+1]`, `x[i]` and `F_i(x[i])`: the inverse of `advance`."""
        total = following - (branch if self.c == 1 else self.c * branch)
        if self.b:
            total = total - (current if self.b == 1 else self.b * current)
        return total if self.a == 1 else total / self.a


@dataclass(frozen=True)
class Re2TAL(Coupling):
    """`x[i+1] = x[i-1] + F_i(x[i])`: each skip connection starts one block earlier.

    The wiring of Re2TAL (Zhao et al., CVPR 2023, arXiv 2211.14053, section 3). A chain starts with `(x, x)` and ends
    with the mean of both streams. The same function in train and in eval mode, and another one than the pretrained
    network's: fine-tune before use. Its inverse neither amplifies nor damps rounding errors.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 1.0

    def leave(self, previous: Tensor, current: Tensor) -> Tensor:
        """The mean of both streams."""
        return (previous + current) * 0.5


@dataclass(frozen=True)
class Original(Coupling):
    """`x[i+1] = x[i] + F_i(x[i])`: the network as it was, run through the rewritten code.

    Not reversible; `revwire.verify` uses it to prove that the decomposition into branches is exact.
    """

    a: float = 0.0
    b: float = 1.0
    c: float = 1.0


_NAMED: dict[str, Callable[[], Coupling]] = {"re2tal": Re2TAL}


def coupling_of(coupling: str | Coupling) -> Coupling:
    """The coupling a user meant, by name or as an object.

    Raises:
        RewireError: no coupling has that name; the message lists the names there are.
    """
    if isinstance(coupling, Coupling):
        return coupling
    if (named := _NAMED.get(coupling.lower())) is None:
        raise RewireError(f"unknown coupling {coupling!r}; known: {', '.join(_NAMED)}")
    return named()
