"""One timm architecture with other classes, channels or input size: what changes, and what a shape tells of it.

Nothing is assumed of how a family names its tensors: an architecture is built twice on the meta device, as it is and
with all three changed, and the two are compared.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError
from revwire.libraries import timm_models
from revwire.libraries.comparison import counted, shapes_of
from revwire.libraries.interface import Architecture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from revwire.libraries.comparison import Shapes

_CLASSES = 7  # of the changed build where the architecture has none; else it gets none
# What a constructor may refuse, the likeliest first.
_ARGUMENTS = ("img_size", "in_chans", "num_classes")


@dataclass(frozen=True)
class Variants:
    """An architecture, and what about it can be otherwise.

    Attributes:
        name: timm's name.
    """

    name: str

    @cached_property
    def outline(self) -> nn.Module:
        """As timm builds it, on the meta device."""
        return Architecture(self.name).outline()

    @cached_property
    def shapes(self) -> Shapes:
        """Names and shapes of the outline's tensors."""
        return shapes_of(self.outline)

    @cached_property
    def _own(self) -> dict[str, int]:
        """Classes, channels and the side of the input it is built for."""
        size = timm_models.image_size(self.outline)
        return {
            "num_classes": int(getattr(self.outline, "num_classes", 0) or 0),
            "in_chans": timm_models.channels(self.outline),
            "img_size": size[0] if size else 0,
        }

    @cached_property
    def _changed(self) -> tuple[dict[str, int], Shapes]:
        """The changed build: its arguments, those only that the constructor takes, and its shapes."""
        own = self._own
        arguments = {
            "num_classes": 0 if own["num_classes"] else _CLASSES,
            "in_chans": own["in_chans"] + 1,
            "img_size": 2 * own["img_size"],
        }
        if not own["img_size"]:
            del arguments["img_size"]
        for refused in (*_ARGUMENTS, None):
            with contextlib.suppress(RevwireError):
                return arguments, shapes_of(Architecture(self.name, arguments).outline())
            if refused:
                arguments.pop(refused, None)
        return {}, self.shapes

    @property
    def flexible(self) -> set[str]:
        """Names of the tensors that depend on classes, channels or input size."""
        other = self._changed[1]
        return {n for n in {**self.shapes, **other} if self.shapes.get(n) != other.get(n)}

    def arguments_for(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """The arguments that may give these shapes, the likeliest first.

        Args:
            shapes: Names and shapes of a state dict whose other tensors fit the architecture.

        Yields:
            Arguments of `timm.create_model`; whether they fit is seen by building.
        """
        if counted(shapes) == counted(self.shapes):
            yield {}
            return
        arguments: dict[str, Any] = {}
        image: set[str] = set()
        for name in sorted(self.flexible):
            role = self._role(name)
            if role == "img_size":
                image.add(name)
            elif role and name in shapes and shapes[name] != self.shapes.get(name):
                arguments[role] = self._count(role, name, shapes[name])
        if self._own["num_classes"] and not any(
            name in shapes for name in self.flexible if self._role(name) == "num_classes"
        ):
            arguments["num_classes"] = 0
        arguments = {key: value for key, value in arguments.items() if value is not None}
        moved = [name for name in image if name in shapes and shapes[name] != self.shapes[name]]
        if not moved:
            yield arguments
            return
        if "img_size" in self._changed[0]:
            for side in self._sides({name: shapes[name] for name in moved}):
                yield {**arguments, "img_size": side}

    def _role(self, name: str) -> str | None:
        """Which argument a tensor tells of."""
        before, after = self.shapes.get(name), self._changed[1].get(name)
        if before is None or after is None:
            return "num_classes"
        if len(before) != len(after):
            return None
        chans = self._own["in_chans"]
        moved = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
        if "in_chans" in self._changed[0] and moved and all(b * (chans + 1) == a * chans for b, a in moved):
            return "in_chans"
        return "img_size"

    def _count(self, role: str, name: str, shape: tuple[int, ...]) -> int | None:
        """Classes or channels of a tensor of this shape; None where it has no such dimension."""
        before, own = self.shapes.get(name), self._own[role]
        if role == "num_classes" and not own:  # built without classes: the changed build has the head
            before, own = self._changed[1].get(name), self._changed[0].get(role, 0)
        if not before or not own or len(before) != len(shape):
            return None
        moved = [(b, s) for b, s in zip(before, shape, strict=True) if b != s and b % own == 0]
        if not moved and before == shape:
            return own
        return moved[0][1] * own // moved[0][0] if moved else None

    def _sides(self, found: Shapes) -> list[int]:
        """Sides of a square input for tensors of these shapes, by how their shapes grow between the two builds."""
        side, guesses = self._own["img_size"], []
        for name, shape in sorted(found.items()):
            first, second = self.shapes[name], self._changed[1][name]
            if len(shape) != len(first):
                return []
            moved = [place for place, size in enumerate(first) if size != second[place]]
            sizes = tuple(math.prod(each[place] for place in moved) for each in (first, second, shape))
            guesses.append([_solve(side, sizes, law) for law in _LAWS])
        every = dict.fromkeys(guess for guess in guesses[0] if guess)
        return [guess for guess in every if all(guess in other for other in guesses)]


# How sizes grow with the side of the input, as (power, degree, rest): `(size - rest) ** power` is a line in `side **
# degree`. Tokens; relative positions in two dimensions, with and without those of a class token; in one; token pairs.
_LAWS = ((1, 2, 0), (0.5, 1, 0), (0.5, 1, 3), (1, 1, 0), (0.5, 2, 0))


def _solve(side: int, sizes: tuple[int, ...], law: tuple[float, int, int]) -> int | None:
    """The side at which the last size lies on the law's line through the first two: at one and at two sides."""
    power, degree, rest = law
    if min(sizes) <= rest:
        return None
    start, end, here = ((size - rest) ** power for size in sizes)
    if start == end:
        return None
    part = (here - start) / (end - start)
    raised = side**degree + part * ((2 * side) ** degree - side**degree)
    guess = round(raised ** (1 / degree)) if raised > 0 else 0
    return guess if guess > 0 and abs(guess**degree - raised) < 1e-6 * raised else None
