"""Which architecture a state dict is of, told from the names and shapes of its tensors.

The index in the package names the candidates, and building them on the meta device decides: nothing is believed that
does not fit strictly. Architectures that fit alike but compute something else are a tie, and a tie is the caller's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revwire import timm_models
from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.fit import misfit
from revwire.errors import RevwireError
from revwire.timm_models import Architecture
from revwire.timm_variants import Shapes, Variants, settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

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
        """Every name that fits."""
        return [each.name for group in self.choices for each in group]

    def in_words(self) -> str:
        """The tie as a message lists it, the same functions in one place."""
        groups = [
            str(group[0]) + (f" (= {', '.join(each.name for each in group[1:])})" if group[1:] else "")
            for group in self.choices
        ]
        rest = f" and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
        return ", ".join(groups[:_LISTED]) + rest


def identify(tensors: Mapping[str, Tensor]) -> Found:
    """Find the architectures of timm whose tensors these are.

    Classes, channels and the side of a square input may differ from what an architecture has by itself.

    Args:
        tensors: A state dict; only names, shapes and kinds of number are looked at.

    Returns:
        What fits strictly; no choices where nothing does.
    """
    shapes = _shapes(tensors)
    groups: list[tuple[Any, list[Architecture]]] = []
    for name in index().with_shapes(shapes):
        fitting = _fitting(name, tensors, shapes)
        if fitting is None:
            continue
        architecture, function = fitting
        same = next((group for known, group in groups if known == function), None)
        if same is None:
            groups.append((function, [architecture]))
        else:
            same.append(architecture)
    return Found([sorted(group, key=_plainness) for _, group in groups])


def arguments_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments with which an architecture fits a state dict; None where none do.

    Args:
        name: timm's name of the architecture.
        tensors: The state dict.
    """
    fitting = _fitting(name, tensors, _shapes(tensors))
    return dict(fitting[0].model_args) if fitting else None


def near(tensors: Mapping[str, Tensor]) -> list[str]:
    """Architectures whose tensors have the same names but other shapes: one of them with other arguments."""
    return index().with_names(_shapes(tensors))


def _fitting(
    name: str, tensors: Mapping[str, Tensor], shapes: Shapes
) -> tuple[Architecture, dict[str, Any]] | None:
    """An architecture with the arguments that fit, and the settings that make its function."""
    if not timm_models.exists(name):  # the index may be of another version of timm
        return None
    variants = Variants(name)
    try:
        for arguments in variants.arguments_for(shapes):
            architecture = Architecture(name, arguments)
            outline = architecture.outline() if arguments else variants.outline
            if not misfit(outline, tensors):
                return architecture, settings(outline)
    except RevwireError:
        return None
    return None


def _plainness(architecture: Architecture) -> tuple[int, int, str]:
    return len(json.dumps(dict(architecture.model_args))), len(architecture.name), architecture.name


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
