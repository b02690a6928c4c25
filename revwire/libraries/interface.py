"""The libraries whose models revwire can build: one module for each, all with the same functions.

An `Architecture` names a model of one of them. Its short form, `spec`, is what the command line, metadata and reports
use: `resnet50` is timm's, `torchvision/resnet50` and `transformers/ViTModel` name their library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from revwire.errors import RevwireError
from revwire.libraries.noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from revwire.libraries.comparison import Shapes
    from revwire.libraries.fit import Fit

TIMM = "timm"  # whose names need no library before them
NAMES = (TIMM, "torchvision", "transformers")
OPTIONAL = {"torchvision": "its models; timm needs it", "transformers": "Hugging Face models"}
"""Libraries that revwire does without, and what they are for."""

OF_THE_HUB = {
    "transformers"
}  # whose tensors' names begin with what elsewhere is a wrapper's prefix (`model.`)
MARK = "revwire"
"""The attribute of a config, and the key beside a state_dict's tensors, that tell how a model is rewired."""
INDEXED = (
    TIMM,
    "torchvision",
)  # whose architectures are known by their tensors; an earlier one's names go first


@dataclass(frozen=True)
class Architecture:
    """A model of a library, with the arguments that build the same shapes again.

    Attributes:
        name: The library's name of the model: `vit_tiny_patch16_224`, `swin3d_t`; a class of transformers'.
        model_args: Keyword arguments, of types JSON can hold; of transformers the configuration.
        library: One of `NAMES`.
    """

    name: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    library: str = TIMM

    @classmethod
    def of(cls, spec: str, model_args: Mapping[str, Any] | None = None) -> Architecture:
        """The architecture of a short form: `resnet50`, `torchvision/resnet50`."""
        before, slash, name = spec.partition("/")
        known = bool(slash) and before in NAMES
        return cls(name if known else spec, dict(model_args or {}), before if known else TIMM)

    @property
    def spec(self) -> str:
        """The short form of the name."""
        return self.name if self.library == TIMM else f"{self.library}/{self.name}"

    def __str__(self) -> str:
        shown = library(self.library).shown(self.model_args)
        return f"{self.spec} {json.dumps(shown)}" if shown else self.spec

    def exists(self) -> bool:
        """Whether the library can build a model of this name."""
        return library(self.library).exists(self.name)

    def unknown(self) -> str:
        """The words for a name the library does not know, with the names it may have meant."""
        return library(self.library).unknown_name(self.name)

    def build(self) -> nn.Module:
        """The model with random weights, as its library makes it.

        Raises:
            RevwireError: The library has no such model, or refuses the arguments.
        """
        return library(self.library).create(self.name, self.model_args)

    def outline(self) -> nn.Module:
        """The model on the meta device: names, shapes and settings, no memory, no random numbers drawn.

        Raises:
            RevwireError: As `build`.
        """
        try:
            with torch.device("meta"):
                return self.build()
        except RevwireError:
            # timm before 1.0.22, and a few families elsewhere, look at numbers while building: meta has none
            with torch.random.fork_rng(devices=[]):
                return self.build().to("meta")

    def fit(self, tensors: Mapping[str, Tensor]) -> Fit:
        """How the library's own loading puts a state dict into the model, and what keeps it from that.

        Raises:
            RevwireError: As `build`.
        """
        return library(self.library).fit(self, tensors)

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """The model with the weights of a state dict that fits, on the CPU, in train mode.

        Args:
            tensors: The state dict; its tensors are copied.
            dtype: What the model computes in.

        Raises:
            RevwireError: As `build`.
        """
        return library(self.library).load(self, tensors, dtype)

    def recipe(self, out: Path, fit: Fit) -> str:
        """The call by which the library loads a checkpoint of this model, whose tensors fit it so."""
        return library(self.library).recipe(self, out, fit)

    def companions(self) -> Mapping[str, str]:
        """The files that the library wants beside the weights, by name: none where a file is enough."""
        return library(self.library).companions(self)


class Library(Protocol):
    """What the module of a library has."""

    def exists(self, name: str) -> bool:
        """Whether the library can build a model of this name."""

    def unknown_name(self, name: str) -> str:
        """The words for a name the library does not know."""

    def shown(self, model_args: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of the arguments, what a message shows."""

    def create(self, name: str, model_args: Mapping[str, Any]) -> nn.Module:
        """The model with random weights; no network or file is touched."""

    def fit(self, architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
        """How the library's own loading puts a state dict into the model."""

    def load(
        self, architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> nn.Module:
        """The model with these weights, in train mode."""

    def example_inputs(self, model: nn.Module, batch: int = 2) -> Any | None:
        """What a model of the library is called with; None where that can't be told."""

    def sized_inputs(self, model: nn.Module, size: Sequence[int], batch: int = 2) -> Any:
        """The same for inputs of a size."""

    def describe(self, model: nn.Module, known: Architecture | None = None) -> Architecture:
        """How a model of the library was built."""

    def settings_of(self, model: nn.Module) -> Any | None:
        """What the library writes the attributes of beside the weights; None where there is no such thing."""

    def tensors_of(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The state dict as the library writes it into files."""

    def recipe(self, architecture: Architecture, out: Path, fit: Fit) -> str:
        """The call that loads a checkpoint."""

    def companions(self, architecture: Architecture) -> Mapping[str, str]:
        """Files that the library wants beside the weights, by name."""

    def from_config(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture | None:
        """The model that a `config.json` of this library's form describes, beside these tensors; None for others."""

    def with_config(self, name: str, config: Mapping[str, Any]) -> Architecture | None:
        """The named model as a `config.json` completes it; None where a name and arguments are enough."""

    def respelled(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Tensors in a layout of others under the library's names; None where that is not known."""

    def from_training(self, checkpoint: Mapping[Any, Any]) -> Architecture | None:
        """The model that a training checkpoint of this library's form names; None for others."""


class Variants(Protocol):
    """One architecture, and what about it can be otherwise: classes, channels, input size."""

    @property
    def outline(self) -> nn.Module:
        """As the library builds it by itself, on the meta device."""

    @property
    def shapes(self) -> Shapes:
        """Names and shapes of the outline's tensors."""

    @property
    def flexible(self) -> set[str]:
        """Names of the tensors that depend on the arguments."""

    def arguments_for(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """The arguments that may give these shapes, the likeliest first."""


_MODULES: dict[str, Callable[[], Any]] = {}
_VARIANTS: dict[str, Callable[[str], Variants]] = {}


def register(
    name: str, module: Callable[[], Any], variants_of: Callable[[str], Variants] | None = None
) -> None:
    """Make a library known.

    Args:
        name: One of `NAMES`.
        module: Imports and returns what has the functions of `Library`.
        variants_of: From an architecture's name to what can be otherwise about it, for those of `INDEXED`.
    """
    _MODULES[name] = module
    if variants_of is not None:
        _VARIANTS[name] = variants_of


def library(name: str) -> Library:
    """The module of a library, of those in `NAMES`."""
    if name not in _MODULES:
        raise RevwireError(f"there is no library {name!r}; it is one of {', '.join(NAMES)}")
    found: Library = _MODULES[name]()
    return found


def variants(architecture: Architecture) -> Variants:
    """What can be otherwise about an architecture of one of the `INDEXED` libraries."""
    return _VARIANTS[architecture.library](architecture.name)


def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture that a `config.json` on the Hugging Face hub describes, whichever library wrote it.

    Args:
        config: The parsed file.
        tensors: The state dict beside it.

    Raises:
        RevwireError: it is of a library's form, and makes no sense.
    """
    found = (library(name).from_config(config, tensors) for name in NAMES)
    return next((architecture for architecture in found if architecture is not None), None)


def respelled(name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Tensors in a layout of others under the names of a library, without data; None where that is not known.

    Args:
        name: The library.
        tensors: The state dict.
    """
    return library(name).respelled(tensors)


def from_training(checkpoint: Mapping[Any, Any]) -> Architecture | None:
    """The architecture that a library's own training script noted in its checkpoint."""
    found = (library(name).from_training(checkpoint) for name in NAMES)
    return next((architecture for architecture in found if architecture is not None), None)


def library_of(model: nn.Module) -> Library | None:
    """The library whose class a model's is, or is made from; None for models of others."""
    for cls in type(model).__mro__:
        name = cls.__module__.partition(".")[0]
        if name in NAMES:
            return library(name)
    return None


def settings_of(model: nn.Module) -> Any | None:
    """What a model's library writes the attributes of beside its weights: a config of transformers; None elsewhere."""
    owner = library_of(model)
    return owner.settings_of(model) if owner else None


def example_inputs(model: nn.Module, batch: int = 2) -> Any | None:
    """What a model of a library is called with: noise of the size it was built for, the same at every call.

    Args:
        model: The model the batch is for; its parameters decide dtype and device.
        batch: Number of inputs.

    Returns:
        A tensor, or a dict of keyword arguments; None where it can't be told.
    """
    owner = library_of(model)
    return owner.example_inputs(model, batch) if owner else None


def sized_inputs(model: nn.Module, size: Sequence[int], batch: int = 2) -> Any:
    """Inputs of a size, as its library's models take them: a tensor where the model is of none.

    Args:
        model: The model the batch is for.
        size: Of one input, without the batch.
        batch: Number of inputs.
    """
    owner = library_of(model)
    return owner.sized_inputs(model, size, batch) if owner else noise(model, size, batch)


def noise(model: nn.Module, size: Sequence[int], batch: int = 2) -> Tensor:
    """Noise of shape (batch, *size) in the dtype and on the device of the model's parameters.

    Args:
        model: The model the batch is for.
        size: Of one input.
        batch: Number of inputs.

    Returns:
        Standard normal noise from a generator of its own, so the global one stays where it was.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    made = Noise().normal((batch, *size))
    return made.to(device=like.device, dtype=like.dtype)


def describe(model: nn.Module, known: Architecture | None = None) -> Architecture:
    """How a model was built: proven, by building it on the meta device and comparing.

    Args:
        model: A model of a library, rewired or not.
        known: How the model was built, where that is known; it may have been changed since (another head).

    Raises:
        RevwireError: It can't be told; the message says to pass `arch=` and `model_args=`.
    """
    owner = library(known.library) if known else library_of(model) or library(TIMM)
    return owner.describe(model, known)
