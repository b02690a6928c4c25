"""What revwire knows about timm: the input a model expects, how to build one, and how one was built.

With `timm_variants` the only timm-specific code; everything else sees plain modules. Nothing here touches a network:
models are built without pretrained weights, and arguments that would fetch or open a file are refused.
"""

from __future__ import annotations

import argparse
import difflib
import json
from typing import TYPE_CHECKING, Any

import torch

from revwire.errors import RevwireError
from revwire.libraries.comparison import differences
from revwire.libraries.interface import Architecture, noise
from revwire.libraries.plain_library import (
    companions,
    settings_of,
    shown,
    sized_inputs,
    tensors_of,
    with_config,
)
from revwire.libraries.timm_layouts import fit, load, respelled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

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

# Arguments of timm.create_model that download, open a file or place the model: not a checkpoint's to set.
_RESERVED_ARGS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "dtype",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)


def example_inputs(model: nn.Module, batch: int = 2) -> Tensor | None:
    """A batch of noise images of the size a timm model was built for.

    Args:
        model: The model the batch is for; its parameters decide dtype and device.
        batch: Number of images.

    Returns:
        Images of shape (batch, channels, height, width), the same at every call, drawn without the global
        generator; None where the model isn't timm's or its size is unknown.
    """
    height_width = image_size(model)
    if height_width is None:
        return None
    return noise(model, (channels(model), *height_width), batch)


def recipe(architecture: Architecture, out: Path, fit: Fit) -> str:
    """The call by which timm loads a checkpoint of the model: of other layouts, the one that runs its filter."""
    arguments = "".join(f", {key}={value!r}" for key, value in architecture.model_args.items())
    called = f"timm.create_model({architecture.name!r}{arguments}"
    if fit.renamed:
        classes = architecture.model_args.get("num_classes")
        own = {
            "file": out.name,
            "custom_load": False,
            **({} if classes is None else {"num_classes": classes}),
        }
        return f"{called}, pretrained=True, pretrained_cfg_overlay={own!r})"
    if fit.carried:
        return f"{called}).load_state_dict(safetensors.torch.load_file({out.name!r}), strict=False)"
    return f"{called}, checkpoint_path={out.name!r})"


def exists(name: str) -> bool:
    """Whether timm can build a model of this name; a pretrained tag (`.augreg_in1k`) is allowed."""
    import timm

    return bool(timm.is_model(name))


def near_names(name: str) -> list[str]:
    """At most three names of timm models that `name` may have meant, the likeliest first."""
    import timm

    asked = name.partition(".")[0].lower().replace("-", "_")
    names = timm.list_models()
    # A beginning such as vit_tiny is too short to be close to any name: the shortest name it begins is meant.
    near = sorted((n for n in names if n.startswith(asked)), key=len) if len(asked) >= 3 else []
    near += difflib.get_close_matches(asked, names, n=3, cutoff=0.75)
    return list(dict.fromkeys(near))[:3]


def unknown_name(name: str) -> str:
    """The words for a name timm does not know, with the names it may have meant."""
    near = near_names(name)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names it knows"
    return f"timm has no model {name[:100]!r}; {hint}"


def create(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build a timm model with random weights, without touching a network or a file.

    Args:
        name: timm's name of the model.
        model_args: Keyword arguments of `timm.create_model`.

    Returns:
        The model in train mode, as `timm.create_model` leaves it.

    Raises:
        RevwireError: timm has no such model, or refuses the arguments.
    """
    import timm

    if not exists(name):
        raise RevwireError(unknown_name(name))
    if reserved := sorted(_RESERVED_ARGS & set(model_args)):
        raise RevwireError(f"model_args may not hold {reserved[0]!r}: it does not describe an architecture")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **model_args)
    except Exception as error:  # constructors fail in every way on arguments they did not expect
        built = Architecture(name, model_args)
        raise RevwireError(f"timm cannot build {built}: {type(error).__name__}: {error}") from error
    return model


def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture that a `config.json` in the layout of timm's models on the Hugging Face hub describes.

    As timm does, classes and input size of the pretrained weights are read beside `model_args`; they become
    arguments where the named architecture has others by itself.

    Args:
        config: The parsed file.
        tensors: The state dict beside it, which is not looked at.

    Returns:
        The architecture, of a name that timm need not know; None where the config is another library's.

    Raises:
        RevwireError: An entry has the wrong type.
    """
    del tensors
    name = config.get("architecture")
    if not isinstance(name, str):
        return None
    pretrained = config.get("pretrained_cfg", config)
    model_args = config.get("model_args") or {}
    if not isinstance(pretrained, dict) or not isinstance(model_args, dict):
        raise RevwireError("pretrained_cfg and model_args must be JSON objects")
    found = _arguments(
        {**pretrained, "num_classes": config.get("num_classes", pretrained.get("num_classes"))}
    )
    if model_args.get("dynamic_img_size") or model_args.get("strict_img_size") is False:
        found.pop("img_size", None)
    own = _default_arguments(name)
    changed = {key: value for key, value in found.items() if value != own.get(key)}
    return Architecture(name, {**changed, **model_args})


def from_training(checkpoint: Mapping[Any, Any]) -> Architecture | None:
    """The architecture that timm's training script noted in its checkpoint: `arch`, and its own arguments."""
    name, arguments = checkpoint.get("arch"), checkpoint.get("args")
    if not isinstance(name, str) or not isinstance(arguments, argparse.Namespace):
        return None
    noted = {key: getattr(arguments, key, None) for key in ("num_classes", "in_chans")}
    extra = getattr(arguments, "model_kwargs", None)
    noted.update(extra if isinstance(extra, dict) else {})
    plain = (bool, int, float, str)
    return Architecture(name, {str(k): v for k, v in noted.items() if isinstance(v, plain)})


def describe(model: nn.Module, known: Architecture | None = None) -> Architecture:
    """The name and arguments that build a model of the same shapes and settings.

    The answer is proven: it is built on the meta device and compared with the model.

    Args:
        model: A model made by timm, rewired or not.
        known: How the model was built, where that is known; it may have been changed since (another head).

    Returns:
        Its architecture; `model_args` went through JSON, so it builds the same model after being read back.

    Raises:
        RevwireError: It can't be told; the message says to pass `arch=` and `model_args=`.
    """
    recorded = known is not None or hasattr(model, "_model_args")
    known = known or _noted(model)
    outline = known.outline()
    then = _traits(outline)
    changed = {key: value for key, value in _traits(model).items() if value != then.get(key)}
    if changed:
        known = Architecture(known.name, {**known.model_args, **changed})
        outline = known.outline()
    # where no arguments were recorded, shapes alone would take a ViT of 3 heads for one of 6
    fault = next(differences(model, outline, settings=not recorded), None)
    if fault:
        raise _untold(model, f"{known} is not the same: {fault}")
    return known


def _noted(model: nn.Module) -> Architecture:
    """What timm noted on a model: its name, and in recent versions the arguments of `timm.create_model`."""
    name = _config(model).get("architecture")
    if not isinstance(name, str) or not exists(name):
        raise _untold(model, "it does not carry the name of a timm model")
    try:
        args = json.loads(json.dumps(getattr(model, "_model_args", {})))
    except TypeError as error:
        raise _untold(model, f"an argument it was built with cannot be written as JSON ({error})") from error
    return Architecture(name, {key: value for key, value in args.items() if key not in _RESERVED_ARGS})


def _untold(model: nn.Module, why: str) -> RevwireError:
    kind = type(model).__name__
    return RevwireError(
        f"cannot tell how this {kind} was built: {why}; pass arch= (timm's name) and model_args="
    )


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that timm takes from the configuration of pretrained weights."""
    size = config.get("input_size")
    arguments = {"num_classes": config.get("num_classes")}
    if isinstance(size, (list, tuple)) and len(size) == 3:
        arguments["in_chans"] = size[0]
        arguments["img_size"] = list(size[1:]) if config.get("fixed_input_size") else None
    return {key: value for key, value in arguments.items() if value is not None}


def _default_arguments(name: str) -> dict[str, Any]:
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such name or tag: building the model will say so
        config = None
    return _arguments(config.to_dict()) if config else {}


def _config(model: nn.Module) -> Mapping[str, Any]:
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, dict):
            return config
    return {}


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width the model was built for, or None.

    The patch embedding comes first: it is what the forward asserts on. Then timm's own record, kept by recent
    versions where the size was an argument; last the pretrained weights' size, which knows of no arguments.
    """
    if not any(cls.__module__.partition(".")[0] == "timm" for cls in type(model).__mro__):
        return None
    traits = getattr(model, "_traits", None)
    candidates = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        traits.get("img_size") if isinstance(traits, dict) else None,
        (_config(model).get("input_size") or ())[-2:],
    )
    for size in candidates:
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def channels(model: nn.Module) -> int:
    """Input channels the model was built with: its own word, its first convolution, its weights' input."""
    channels = getattr(model, "in_chans", None)
    if isinstance(channels, int):
        return channels
    config = _config(model)
    first = config.get("first_conv") or "patch_embed.proj"
    path = first if isinstance(first, str) else first[0]
    for name, module in model.named_modules():
        if name == path and isinstance(module, torch.nn.Conv2d):
            return module.in_channels
    return int((config.get("input_size") or (3,))[0])


def _traits(model: nn.Module) -> dict[str, Any]:
    """What of a model may have changed since it was built, or came from its pretrained configuration."""
    traits = {"num_classes": getattr(model, "num_classes", None), "in_chans": channels(model)}
    traits["img_size"] = image_size(model) if _has_fixed_size(model) else None
    traits["global_pool"] = _pool(model)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in traits.items() if v is not None}


def _has_fixed_size(model: nn.Module) -> bool:
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    traits = getattr(model, "_traits", None)
    return own is not None or (isinstance(traits, dict) and traits.get("img_size") is not None)


def _pool(model: nn.Module) -> str | None:
    """The pooling in use, read where timm keeps it: the head that pools, else the model."""
    head = getattr(model, "head", None)
    for place in (
        getattr(head, "global_pool", None),
        getattr(head, "pool_type", None),
        getattr(model, "global_pool", None),
    ):
        pool = getattr(place, "pool_type", place)
        if isinstance(pool, str):
            return pool
    return None
