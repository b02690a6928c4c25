"""What revwire knows about torchvision: its classification, video and segmentation models, built without weights.

The only file with torchvision-specific code. timm brings torchvision along; nothing here touches a network.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError
from revwire.libraries.comparison import counted, differences, shapes_of
from revwire.libraries.interface import Architecture, noise
from revwire.libraries.plain_library import (
    companions,
    fit,
    from_config,
    from_training,
    load,
    respelled,
    settings_of,
    shown,
    sized_inputs,
    tensors_of,
    with_config,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from revwire.libraries.comparison import Shapes
    from revwire.libraries.fit import Fit

__all__ = [
    "companions",
    "create",
    "describe",
    "example_inputs",
    "exists",
    "fit",
    "from_config",
    "from_training",
    "load",
    "recipe",
    "respelled",
    "settings_of",
    "shown",
    "sized_inputs",
    "tensors_of",
    "unknown_name",
    "with_config",
]

_LIBRARY = "torchvision"
# Arguments that download, or are no data: not a checkpoint's to set.
_RESERVED_ARGS = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"})
_SIDE, _FRAMES = 224, 16  # of what most weights were trained on
# By class: the clip or image that its weights were trained on, where that is another, or would take minutes to verify.
_SIZES = {
    "VideoResNet": (_FRAMES, 112, 112),
    "SwinTransformer3d": (_FRAMES, 112, 112),
    "Inception3": (299, 299),
}
_VIDEO = "torchvision.models.video"
_FURTHEST = (
    1.0  # of the logarithms of two numbers of parameters: a small model's head of 1000 classes is half of it
)
_CLASSES = 7  # of the changed build, which no model has by itself


@cache
def names() -> tuple[str, ...]:
    """The models that take images or clips: no detectors, no optical flow, none that is quantised."""
    import torchvision

    modules = [
        torchvision.models,
        torchvision.models.video,
        torchvision.models.segmentation,
    ]
    return tuple(name for module in modules for name in torchvision.models.list_models(module=module))


def exists(name: str) -> bool:
    """Whether torchvision can build a model of this name."""
    return name in names()


def unknown_name(name: str) -> str:
    """The words for a name torchvision does not know, with the names it may have meant."""
    asked = name.lower().replace("-", "_")
    near = difflib.get_close_matches(asked, names(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(f'{_LIBRARY}/{each}' for each in near)}?" if near else ""
    return f"torchvision has no image, video or segmentation model {name[:100]!r}; " + (
        hint or "torchvision.models.list_models() lists the names it knows"
    )


def create(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build a torchvision model with random weights, without touching a network.

    Args:
        name: torchvision's name of the model.
        model_args: Keyword arguments of `torchvision.models.get_model`.

    Raises:
        RevwireError: torchvision has no such model, or refuses the arguments.
    """
    import torchvision

    if not exists(name):
        raise RevwireError(unknown_name(name))
    if reserved := sorted(_RESERVED_ARGS & set(model_args)):
        raise RevwireError(f"model_args may not hold {reserved[0]!r}: it does not describe an architecture")
    own: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:
        own["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        own["init_weights"] = False  # theirs takes a minute
    try:
        model: nn.Module = torchvision.models.get_model(name, **{**own, **model_args})
    except Exception as error:  # constructors fail in every way on arguments they did not expect
        built = Architecture(name, model_args, _LIBRARY)
        raise RevwireError(f"torchvision cannot build {built}: {type(error).__name__}: {error}") from error
    return model


def example_inputs(model: nn.Module, batch: int = 2) -> Tensor | None:
    """A batch of noise images or clips of a size that the model takes.

    Args:
        model: The model the batch is for.
        batch: Number of inputs.

    Returns:
        (batch, 3, height, width), of video models (batch, 3, frames, height, width); None for models of detection.
    """
    for cls in type(model).__mro__:
        home = cls.__module__
        if home.startswith(_LIBRARY) and not home.startswith(
            ("torchvision.models.detection", "torchvision.ops")
        ):
            return noise(model, (3, *_size(model, cls.__name__, video=home.startswith(_VIDEO))), batch)
    return None


def _size(model: nn.Module, kind: str, *, video: bool) -> tuple[int, ...]:
    if kind in _SIZES:
        return _SIZES[kind]
    if kind == "MViT":
        positions: Any = model.pos_encoding
        stride: Any = model.conv_proj.stride
        tokens = (positions.temporal_size, *positions.spatial_size)
        return tuple(int(n * step) for n, step in zip(tokens, stride, strict=True))
    side = getattr(model, "image_size", _SIDE)  # a ViT's
    side = side if isinstance(side, int) else _SIDE
    return (_FRAMES, side, side) if video else (side, side)


def recipe(architecture: Architecture, out: Path, fit: Fit) -> str:
    """The call by which torchvision's model takes a checkpoint."""
    arguments = "".join(f", {key}={value!r}" for key, value in architecture.model_args.items())
    return (
        f"torchvision.models.get_model({architecture.name!r}{arguments}).load_state_dict("
        f"safetensors.torch.load_file({out.name!r}){', strict=False' if fit.carried else ''})"
    )


def describe(model: nn.Module, known: Architecture | None = None) -> Architecture:
    """The name and arguments that build a model of the same shapes and settings.

    torchvision notes neither on a model. So the models of its module are built on the meta device, those with the
    nearest number of parameters first, until one is the same.

    Args:
        model: A model made by torchvision, rewired or not.
        known: How the model was built, where that is known; its head may have been changed since.

    Raises:
        RevwireError: It can't be told; the message says to pass `arch=` and `model_args=`.
    """
    shapes = shapes_of(model)
    fault = ""
    for name in [known.name] if known else _like(model):
        others = (known.model_args,) if known else ()
        for arguments in (*others, *Variants(name).arguments_for(shapes)):
            found = Architecture(name, {**(known.model_args if known else {}), **arguments}, _LIBRARY)
            difference = next(differences(model, found.outline(), settings=known is None), None)
            if difference is None:
                return found
            fault = fault or f": {found} is not the same: {difference}"
    raise RevwireError(
        f"cannot tell how this {type(model).__name__} was built{fault}; pass arch= ({_LIBRARY}/NAME) and model_args="
    )


def _like(model: nn.Module) -> list[str]:
    """The models built by the module that a model's class is of, those of about its size, the nearest first."""
    import torchvision

    homes = {cls.__module__ for cls in type(model).__mro__}
    size = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for name in names():
        if inspect.getmodule(torchvision.models.get_model_builder(name)).__name__ in homes:  # type: ignore[union-attr]
            weights = next(iter(torchvision.models.get_model_weights(name)), None)
            told = weights.meta["num_params"] if weights else 0
            found.append((abs(math.log(told / size)) if told and size else 0.0, name))
    return [name for distance, name in sorted(found) if distance < _FURTHEST]


@dataclass(frozen=True)
class Variants:
    """An architecture, and what about it can be otherwise: classes, the input of a ViT, a second head of segmentation.

    Attributes:
        name: torchvision's name.
    """

    name: str

    @cached_property
    def outline(self) -> nn.Module:
        """As torchvision builds it, on the meta device."""
        return Architecture(self.name, {}, _LIBRARY).outline()

    @cached_property
    def shapes(self) -> Shapes:
        """Names and shapes of the outline's tensors."""
        return shapes_of(self.outline)

    @cached_property
    def _heads(self) -> dict[str, int]:
        """Tensors with a dimension for the classes, and which."""
        changed = shapes_of(Architecture(self.name, {"num_classes": _CLASSES}, _LIBRARY).outline())
        return {
            name: next(place for place, size in enumerate(shape) if size != changed[name][place])
            for name, shape in self.shapes.items()
            if shape != changed[name]
        }

    @property
    def _family(self) -> str:
        return type(self.outline).__module__.removeprefix("torchvision.models.").partition(".")[0]

    @property
    def _image(self) -> set[str]:
        """Tensors that depend on the input's size."""
        return {"encoder.pos_embedding"} if hasattr(self.outline, "image_size") else set()

    @cached_property
    def _auxiliary(self) -> Shapes:
        """Tensors of the second head that segmentation models may have."""
        if self._family != "segmentation" or self.name.startswith("lraspp"):
            return {}
        with_it = shapes_of(Architecture(self.name, {"aux_loss": True}, _LIBRARY).outline())
        return {name: shape for name, shape in with_it.items() if name not in self.shapes}

    @property
    def flexible(self) -> set[str]:
        """Names of the tensors that depend on classes or input size, or need not be there."""
        return {*self._heads, *self._image, *self._auxiliary}

    def arguments_for(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """The arguments that may give these shapes, the likeliest first.

        Args:
            shapes: Names and shapes of a state dict whose other tensors fit the architecture.

        Yields:
            Arguments of `torchvision.models.get_model`; whether they fit is seen by building.
        """
        if counted(shapes) == counted(self.shapes):
            yield {}
            return
        arguments: dict[str, Any] = {}
        for name, place in self._heads.items():
            shape = shapes.get(name, ())
            if len(shape) == len(self.shapes[name]) and shape != self.shapes[name]:
                arguments["num_classes"] = shape[place]
        for name in self._image:
            shape = shapes.get(name, ())
            if len(shape) == 3 and shape != self.shapes[name]:
                arguments["image_size"] = math.isqrt(max(0, shape[1] - 1)) * int(self.outline.patch_size)  # type: ignore[arg-type]
        if any(name in shapes for name in self._auxiliary):
            arguments["aux_loss"] = True
        yield arguments
