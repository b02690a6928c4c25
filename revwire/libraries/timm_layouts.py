"""Checkpoints in the layouts that others published them in, read by timm's own filter functions.

Each of timm's families has a function that turns the layouts it knows (OpenAI's and open_clip's CLIP, DINOv2, MAE,
BEiT, the first Swin and ConvNeXt) into timm's names. They are private to the builders, so the one that a builder
hands to timm's loading is taken there.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire.errors import RevwireError
from revwire.libraries.comparison import difference, shape_of
from revwire.libraries.fit import Fit, Origins
from revwire.libraries.plain_library import built, filled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from revwire.libraries.interface import Architecture

_BUILDING = threading.Lock()
# how the weight of a ViT's patches is called in the layouts that its filter knows
_PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")


def fit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
    """How timm's loading puts tensors into a model, with its filter function where their names are not its own.

    Args:
        architecture: What they should fit; it is built on the meta device.
        tensors: The state dict.
    """
    outline = architecture.outline()
    faults = difference(outline, tensors)
    if not faults:
        return Fit()
    try:
        found = _filtered(architecture, outline, tensors, on_meta=True)
    except RevwireError:
        return Fit(faults=faults)
    named, origins = found
    if difference(outline, named):
        return Fit(faults=faults)  # of the file's own names, which its reader knows
    used: set[str] = set()
    renamed: dict[str, str] = {}
    for name, tensor in named.items():
        old = sorted(origins.of(tensor))
        used.update(old)
        if old != [name] or tensor.shape != tensors[name].shape:
            renamed[name] = _told(old, tensors, tensor)
    carried = {name: shape_of(tensor) for name, tensor in tensors.items() if name not in used}
    return Fit(renamed, carried)


def load(architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """As `plain_library.load`, through timm's filter function where the names are not its own."""
    model = built(architecture, dtype)
    if difference(model, tensors):
        tensors, _ = _filtered(architecture, model, tensors, on_meta=False)
    return filled(model, tensors)


def respelled(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """The tensors of a ViT in another layout under timm's names, of their own sizes and without data.

    None where they are in no layout that timm's filter for ViTs knows.

    Args:
        tensors: The state dict.
    """
    patches = next((tensors[name] for name in _PATCHES if name in tensors), None)
    if patches is None or patches.ndim != 4:
        return None
    from timm.models.vision_transformer import checkpoint_filter_fn

    # what the filter looks at in a model: of these sizes, and without positions, it changes no size
    head = torch.nn.Linear(1, 1, device="meta")
    like = SimpleNamespace(
        pos_embed=None, patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=patches)), head=head
    )
    given = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        found: Any = checkpoint_filter_fn(dict(given), like)
    except Exception:  # noqa: BLE001 - it is made for checkpoints that are what they seem
        return None
    found = {name: tensor.to("meta") for name, tensor in found.items() if isinstance(tensor, Tensor)}
    return found if found.keys() != given.keys() else None


def _told(old: list[str], tensors: Mapping[str, Tensor], new: Tensor) -> str:
    """What a tensor of the model is made from."""
    if not old:
        return f"timm's own ({shape_of(new)})"
    if len(old) == 1 and tensors[old[0]].numel() == new.numel():
        return old[0]
    made = [f"{name} ({shape_of(tensors[name])})" for name in old]
    return f"{' and '.join(made)}, as {shape_of(new)}"


def _filtered(
    architecture: Architecture, model: nn.Module, tensors: Mapping[str, Tensor], *, on_meta: bool
) -> tuple[dict[str, Tensor], Origins]:
    """The tensors as the filter function of the family leaves them, and what each was made from."""
    if (own := _filter_of(architecture)) is None:
        raise RevwireError(f"timm has no filter function for {architecture.name}")
    given = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if on_meta else tensor
        for name, tensor in tensors.items()
    }
    origins = Origins(given)
    try:
        with torch.no_grad(), origins:
            found = own(dict(given), model)
    except Exception as error:  # it is made for checkpoints that are what they seem
        raise RevwireError(
            f"timm's filter for {architecture.name} fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise RevwireError(f"timm's filter for {architecture.name} gives no state dict")
    return found, origins


def _filter_of(architecture: Architecture) -> Callable[..., Any] | None:
    """The filter function with which timm would load pretrained weights into the model."""
    import timm
    from timm.models import _builder

    thread, found = threading.get_ident(), list[Any]()

    def noted(*args: Any, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **options)
        found.append(options.get("filter_fn"))
        return None

    with _BUILDING:
        original = _builder.load_pretrained
        _builder.load_pretrained = noted
        try:
            with torch.device("meta"):
                timm.create_model(architecture.name, pretrained=True, **architecture.model_args)
        except Exception:  # noqa: BLE001 - on the meta device some models cannot be built, and some have no weights
            found.clear()
        finally:
            _builder.load_pretrained = original
    return next((each for each in found if each is not None), None)
