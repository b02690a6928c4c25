"""Which architecture a state dict is of, told from the names and shapes of its tensors.

The indexes in the package name candidates; each is built on the meta device, and only one that the tensors fit exactly
is believed. Architectures that fit alike but compute something else are a tie, which is left to the caller to decide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.same_function import same_operations
from revwire.errors import RevwireError
from revwire.libraries import INDEXED, Architecture, variants
from revwire.libraries.comparison import difference, settings
from revwire.printing import first_few

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from revwire.libraries.comparison import Shapes

_LISTED = 40  # how many names a message lists; the rest is counted


@dataclass(frozen=True)
class Found:
    """What fits a state dict.

    Attributes:
        choices: Groups of architectures that compute the same function, in each the plainest first. More than one
            group is a tie.
    """

    choices: Sequence[Sequence[Architecture]]

    @property
    def only(self) -> Architecture | None:
        """The architecture, where all that fit are one function."""
        return self.choices[0][0] if len(self.choices) == 1 else None

    @property
    def names(self) -> list[str]:
        """Every name that fits, with its library before it where that is not timm."""
        return [each.spec for group in self.choices for each in group]

    def in_words(self) -> str:
        """The tie as a message lists it, the same functions in one place."""
        groups = [
            str(group[0]) + (f" (= {', '.join(each.spec for each in group[1:])})" if group[1:] else "")
            for group in self.choices
        ]
        return first_few(groups, _LISTED)


@dataclass(frozen=True)
class _Function:
    """Architectures that compute the same, and one of them built on the meta device."""

    outline: nn.Module
    settings: dict[str, Any]
    architectures: list[Architecture]

    def computes(self, other: _Function) -> bool:
        """Whether the other, of another library, runs the same operations."""
        return self._library != other._library and same_operations(self.outline, other.outline)

    @property
    def _library(self) -> str:
        return self.architectures[0].library


def identify(tensors: Mapping[str, Tensor]) -> Found:
    """Find the architectures whose tensors these are.

    Classes, channels and the side of a square input may differ from what an architecture has by itself.

    Args:
        tensors: A state dict; only names, shapes and kinds of number are looked at.

    Returns:
        What fits strictly; no choices where nothing does.
    """
    shapes = _shapes(tensors)
    found: list[_Function] = []
    for library in INDEXED:
        own: list[_Function] = []
        for name in index(library).with_shapes(shapes):
            fitting = _fitting(Architecture(name, {}, library), tensors, shapes)
            if fitting is None:
                continue
            same = next((each for each in own if each.settings == fitting.settings), None)
            if same is None:
                own.append(fitting)
            else:
                same.architectures.extend(fitting.architectures)
        for each in own:
            twin = next((other for other in found if other.computes(each)), None)
            if twin is None:
                found.append(each)
            else:
                twin.architectures.extend(each.architectures)
    return Found([sorted(each.architectures, key=_plainness) for each in found])


def arguments_of(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments with which an architecture fits a state dict; None where none do.

    Args:
        architecture: Of an indexed library; its arguments are not looked at.
        tensors: The state dict.
    """
    fitting = _fitting(architecture, tensors, _shapes(tensors))
    return dict(fitting.architectures[0].model_args) if fitting else None


def near(tensors: Mapping[str, Tensor]) -> list[str]:
    """Architectures whose tensors have the same names but other shapes: one of them with other arguments."""
    shapes = _shapes(tensors)
    return [
        Architecture(name, {}, library).spec
        for library in INDEXED
        for name in index(library).with_names(shapes)
    ]


def _fitting(architecture: Architecture, tensors: Mapping[str, Tensor], shapes: Shapes) -> _Function | None:
    """An architecture with the arguments that fit, and the settings that make its function."""
    if not architecture.exists():  # the index may be of another version of the library
        return None
    others = variants(architecture)
    try:
        for arguments in others.arguments_for(shapes):
            candidate = Architecture(architecture.name, arguments, architecture.library)
            outline = candidate.outline() if arguments else others.outline
            if not difference(outline, tensors):
                return _Function(outline, settings(outline), [candidate])
    except RevwireError:
        return None
    return None


def _plainness(architecture: Architecture) -> tuple[int, int, int, str]:
    order = INDEXED.index(architecture.library)
    return order, len(json.dumps(dict(architecture.model_args))), len(architecture.name), architecture.name


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
