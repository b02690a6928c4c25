"""The two-step recurrence over two streams, and its named coefficient sets.

    x[i+1] = a * x[i-1] + b * x[i] + c * F_i(x[i])          inverse: x[i-1] = (x[i+1] - b*x[i] - c*F_i(x[i])) / a

Every published way of making a residual network reversible without new parameters is one choice of (a, b, c), of what
enters a chain and of what leaves it. Where b is not 0 the branch may be any block G that keeps the trunk's shape:
F_i(x) = G_i(x) - x.
"""

from __future__ import annotations

import cmath
import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from revwire.errors import RewireError
from revwire.run.recurrence import Weights

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST = 2.0**15
"""Of a coefficient: beyond it streams leave the range of half precision at once."""


@dataclass(frozen=True)
class Coupling:
    """One's own choice of coefficients: a chain is entered with `(x, x)` and left with the last stream.

    The same function in train and in eval mode. Subclasses are the published choices.

    Attributes:
        a: Weight of the stream before the last, `x[i-1]`. 0 makes the recurrence irreversible, and is taken only for
            the network as it was (b = c = 1), which then runs as it did and saves no memory.
        b: Weight of the last stream, `x[i]`.
        c: Weight of the branch's output, `F_i(x[i])`.

    Raises:
        RewireError: coefficients that are not finite or leave float16's range, a branch that is not used, or a = 0 for
            another network.
    """

    a: float
    b: float
    c: float

    a_is: ClassVar[str] = "a"
    """The parameter that decides |a|, for messages."""

    def __post_init__(self) -> None:
        if not all(abs(weight) <= _LARGEST for weight in (self.a, self.b, self.c)) or not self.c:
            raise RewireError(
                f"{self!r}: a, b and c must be within {_LARGEST:g}, and c not 0 (the branches would not count)"
            )
        if not self.a and (self.b, self.c) != (1, 1):
            raise RewireError(
                f"{self!r}: with a = 0, x[i-1] is lost and cannot be reconstructed; choose {self.a_is} other than 0"
            )

    @property
    def name(self) -> str:
        """The name `rewire(coupling=...)` knows it by."""
        return type(self).__name__.lower()

    @property
    def spec(self) -> str:
        """Name and coefficients in one word that `coupling_of` reads back: `dr2net(alpha=1.0,beta=0.125)`."""
        own = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
        return f"{self.name}({own})" if own else self.name

    @property
    def keeps_function(self) -> bool:
        """Whether `x[i]` is part of `x[i+1]`, so that a block that is not a pure sum can be a step."""
        return bool(self.b)

    @property
    def noise(self) -> float:
        """The most that the inverse amplifies rounding errors, per step of a long chain.

        1 / min|lambda| over the roots of lambda^2 = b * lambda + a, and no less than 1; infinite for a = 0.
        """
        root = cmath.sqrt(self.b**2 + 4 * self.a)
        smallest = min(abs(self.b + root), abs(self.b - root)) / 2
        return max(1.0, 1 / smallest) if self.a and smallest else math.inf

    def error_after(self, steps: int, rounding: float) -> float:
        """The relative error that a `rounding` grows to on the way back over so many steps, at most 1."""
        return math.exp(min(0.0, math.log(rounding) + steps * math.log(self.noise)))

    def in_mode(self, *, training: bool) -> Coupling:  # noqa: ARG002 - BDIA asks
        """The recurrence that runs in train or in eval mode."""
        return self

    def weights(self, x: Tensor, *, first: bool) -> Weights:  # noqa: ARG002 - BDIA asks
        """The coefficients of one step.

        Args:
            x: The trunk before it.
            first: Whether it is the first step of its chain.
        """
        return Weights(self.a, self.b, self.c)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(x[-1], x[0])` of a chain that is given `x`."""
        return x, x

    def leave(self, previous: Tensor, current: Tensor) -> Tensor:  # noqa: ARG002 - others use both
        """The one tensor that the rest of the network sees of `(x[i-1], x[i])`."""
        return current


def _fixed(value: float) -> float:
    default: float = field(default=value, init=False, repr=False)
    return default


def _derived() -> float:
    derived: float = field(init=False, repr=False)
    return derived


@dataclass(frozen=True)
class Re2TAL(Coupling):
    """`x[i+1] = x[i-1] + F_i(x[i])`: each skip connection starts one block earlier.

    The wiring of Re2TAL (Zhao et al., CVPR 2023, arXiv 2211.14053, section 3). A chain starts with `(x, x)` and ends
    with the mean of both streams. The same function in train and in eval mode, and another one than the pretrained
    network's: fine-tune before use. Its inverse neither amplifies nor damps rounding errors.
    """

    a: float = _fixed(1.0)
    b: float = _fixed(0.0)
    c: float = _fixed(1.0)

    def leave(self, previous: Tensor, current: Tensor) -> Tensor:
        """The mean of both streams."""
        return (previous + current) * 0.5


@dataclass(frozen=True)
class Dr2Net(Coupling):
    """`x[i+1] = beta * x[i-1] + alpha * x[i] + F_i(x[i])`: the pretrained skip, and one from a block earlier.

    Dr2Net (Zhao et al., CVPR 2024, arXiv 2401.04105). A chain starts with `(0, x)`, so that its first block is
    `alpha * x + F(x)`, and ends with the last stream. The same function in train and in eval mode: the pretrained
    network's for (1, beta -> 0); `revwire.Dr2NetSchedule` moves from there to (0, 1) while training goes on. The
    smaller beta, the more its inverse amplifies rounding errors (10.9 times a step at (1, 0.1)): use it with
    `exact=True`, which takes beta = 1, 1/2, 1/4, ...

    Attributes:
        alpha: Weight of the pretrained skip.
        beta: Weight of the added skip; 0 is irreversible, taken only with alpha = 1 (the pretrained network itself).
    """

    alpha: float = 1.0
    beta: float = 0.125
    a: float = _derived()
    b: float = _derived()
    c: float = _fixed(1.0)
    a_is: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        _set(self, a=self.beta, b=self.alpha)
        super().__post_init__()

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(0, x)`: before the first block there is no earlier state."""
        return torch.zeros_like(x), x


@dataclass(frozen=True)
class Momentum(Coupling):
    """`v' = gamma * v + (1 - gamma) * F_i(x), x' = x + v'`: residual blocks push a velocity.

    Momentum ResNet (Sander et al., ICML 2021, arXiv 2102.07870) as a recurrence of x alone: a = -gamma,
    b = 1 + gamma, c = 1 - gamma. A chain starts with `(x, x)`, velocity 0, and ends with the last stream. The same
    function in train and in eval mode, the pretrained network's for gamma = 0 (then irreversible: it runs as it did
    and saves no memory). Its inverse amplifies rounding errors 1 / gamma times a step.

    Attributes:
        gamma: How much of the velocity a step keeps, from 0 to less than 1.
    """

    gamma: float = 0.5
    a: float = _derived()
    b: float = _derived()
    c: float = _derived()
    a_is: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise RewireError(f"momentum needs 0 <= gamma < 1, not {self.gamma}")
        _set(self, a=-self.gamma, b=1 + self.gamma, c=1 - self.gamma)


@dataclass(frozen=True)
class BDIA(Coupling):
    """`x[i+1] = g * x[i-1] + (1 - g) * x[i] + (1 + g) * F_i(x[i])`, g = gamma or -gamma at random while training.

    BDIA (Zhang et al., arXiv 2407.09093). In train mode g is drawn for each sample and step from torch's generator;
    samples are the entries of the trunk's first dimension. A chain starts with `x[1] = x[0] + F_0(x[0])` and ends with
    the last stream. In eval mode g is its mean, 0: the pretrained network itself, run as it was, to the bit. That
    holds nothing to reverse, so gradients in eval mode cost the memory of the plain network. Its inverse amplifies
    rounding errors 1 / gamma times a step. Three numbers per sample and step are kept for backward.

    Attributes:
        gamma: Size of g, between 0 and 1.
    """

    gamma: float = 0.5
    a: float = _derived()
    b: float = _derived()
    c: float = _derived()
    a_is: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise RewireError(f"bdia needs 0 < gamma < 1, not {self.gamma}")
        _set(self, a=self.gamma, b=1 - self.gamma, c=1 + self.gamma)

    def in_mode(self, *, training: bool) -> Coupling:
        """The network as it was, in eval mode."""
        return self if training else Original()

    def weights(self, x: Tensor, *, first: bool) -> Weights:
        """Draws g for every sample; none for the first step, which has no step before it to look back on."""
        if first:
            return Weights(0.0, 1.0, 1.0)
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if x.ndim else ()
        signs = torch.randint(0, 2, shape, device=x.device).to(x.dtype)
        g = signs.mul_(2 * self.gamma).sub_(self.gamma)
        return Weights(g, 1 - g, 1 + g)


@dataclass(frozen=True)
class Original(Coupling):
    """`x[i+1] = x[i] + F_i(x[i])`: the network as it was, run through the rewritten code.

    Not reversible; `revwire.verify` uses it to prove that the decomposition into branches is exact.
    """

    a: float = _fixed(0.0)
    b: float = _fixed(1.0)
    c: float = _fixed(1.0)


def _set(coupling: Coupling, **weights: float) -> None:
    for name, weight in weights.items():
        object.__setattr__(coupling, name, weight)


_NAMED: dict[str, Callable[..., Coupling]] = {
    "re2tal": Re2TAL,
    "dr2net": Dr2Net,
    "momentum": Momentum,
    "bdia": BDIA,
    "coupling": Coupling,
}
_SPEC = re.compile(r"\s*([a-z0-9_]+)\s*(?:\((.*)\))?\s*", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"\s*([a-z]+)\s*=\s*([-+0-9.e]+)\s*", re.IGNORECASE)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def coupling_of(coupling: str | Coupling) -> Coupling:
    """The coupling a user meant: an object, a name, or a name with coefficients (`dr2net(alpha=1,beta=0.125)`).

    Raises:
        RewireError: no coupling has that name, or not those coefficients; the message lists what there is.
    """
    if isinstance(coupling, Coupling):
        return coupling
    matched = _SPEC.fullmatch(coupling)
    named = _NAMED.get(matched[1].lower()) if matched else None
    if matched is None or named is None:
        raise RewireError(f"unknown coupling {coupling[:80]!r}; known: {', '.join(_NAMED)}")
    own = [f.name for f in fields(named) if f.init]  # type: ignore[arg-type]
    found: dict[str, float] = {}
    for part in (matched[2] or "").split(",") if (matched[2] or "").strip() else ():
        number = _NUMBER.fullmatch(part)
        value = _number(number[2]) if number else None
        if number is None or value is None or number[1] not in own or number[1] in found:
            takes = f"{matched[1].lower()}({','.join(f'{name}=NUMBER' for name in own)})" if own else "none"
            raise RewireError(
                f"cannot read {part.strip()[:40]!r} of coupling {coupling[:80]!r}; coefficients it takes: {takes}"
            )
        found[number[1]] = value
    try:
        return named(**found)
    except TypeError:
        raise RewireError(f"coupling {coupling[:80]!r} needs all of {', '.join(own)}") from None
