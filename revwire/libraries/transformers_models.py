"""What revwire knows about Hugging Face transformers: a model built from its configuration, its inputs, its files.

With `transformers_config` and `transformers_inputs` the only transformers-specific code. An architecture is a class of
transformers with the `config.json` as its arguments. Files are read as `from_pretrained` reads a state dict.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from revwire.errors import RevwireError
from revwire.libraries.comparison import differences, faults, shape_of
from revwire.libraries.interface import Architecture
from revwire.libraries.noise import Noise
from revwire.libraries.plain_library import from_training
from revwire.libraries.transformers_config import (
    LIBRARY,
    alone,
    check_counts,
    config_class,
    installed,
    model_class,
    parts,
    refuse,
    unbuildable,
    unknown_class,
)
from revwire.libraries.transformers_inputs import inputs_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = [
    "companions",
    "create",
    "describe",
    "example_inputs",
    "exists",
    "from_config",
    "from_training",
    "load",
    "misfit",
    "recipe",
    "shown",
    "sized_inputs",
    "tensors_of",
    "unknown_name",
]

_SLACK = 2**24  # parameters that a file may lack before the model is not even built to tell which


def exists(name: str) -> bool:
    """Whether transformers has a model class of this name.

    Raises:
        RevwireError: transformers is not installed.
    """
    return model_class(name) is not None


def unknown_name(name: str) -> str:
    """The words for a class transformers does not have."""
    return unknown_class(name)


def shown(model_args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the configuration, what a message shows: nothing, it is long and lies beside the file."""
    del model_args
    return {}


def from_config(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a `config.json` of transformers describes.

    Args:
        config: The parsed file.

    Returns:
        The class that `architectures` names, or the model without a head where it names none; None where the
        configuration has no `model_type`.

    Raises:
        RevwireError: An entry has the wrong type, nothing of the name is known, the configuration wants code of its own
            to be run, its weights are quantised, or transformers is not installed.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    if kind is None:
        return None
    if not isinstance(kind, str):
        raise RevwireError(f"model_type must be a string, not {str(kind)[:50]}")
    if named is not None and not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise RevwireError(f"architectures must be a list of class names, not {str(named)[:50]}")
    refuse(config)
    own = config_class(kind)
    name = named[0] if named else None
    if name is None:
        base = installed().AutoModel._model_mapping.get(own, None)  # noqa: SLF001 - it has no public one
        base = base[0] if isinstance(base, tuple) else base
        if base is None:
            raise RevwireError(f"it names no architectures, and model_type {kind!r} has no model of its own")
        name = base.__name__
    return Architecture(name, dict(config), LIBRARY)


def create(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build a model of transformers with random weights, without touching a network or a file.

    Args:
        name: The class.
        model_args: The configuration, as `config.json` has it.

    Returns:
        The model in train mode.

    Raises:
        RevwireError: transformers has no such class, or it refuses the configuration.
    """
    kind, configuration = parts(name, model_args)
    with alone():
        try:
            model: nn.Module = kind._from_config(configuration)  # noqa: SLF001 - what AutoModel.from_config calls
        except Exception as error:  # a configuration of other types fails in every way
            raise unbuildable(name, error) from error
    return model.train()


def misfit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the model, in words; names are understood as `from_pretrained` does.

    What is tied to a tensor that is there may be missing, and so may buffers of indexes, which are constants.

    Args:
        architecture: The class and its configuration.
        tensors: The state dict.

    Raises:
        RevwireError: The model cannot be built.
    """
    check_counts(architecture.model_args, len(tensors))
    with torch.device(
        "meta"
    ):  # where from_pretrained builds it too: what can't be built there is not built at all
        outline = create(architecture.name, architecture.model_args)
    wanted = sum(parameter.numel() for parameter in outline.parameters())
    there = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * there + _SLACK:  # what is missing would be allocated, to find out its name
        return f"its configuration describes {wanted} numbers, and {there} are there"
    placeholders = {  # one number each, of the dtype of the model: another would be converted, and take memory
        name: torch.empty(1, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype).expand(
            tensor.shape
        )
        for name, tensor in tensors.items()
    }
    model, info = _pretrained(architecture, placeholders, torch.float32, ignore_mismatched_sizes=True)
    state = model.state_dict()
    constants = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    missing = [
        f"{name} ({shape_of(state[name])})"
        for name in sorted(info["missing_keys"])
        if name in state and name not in constants
    ]
    unknown = [
        f"{name} ({shape_of(tensors[name])})" if name in tensors else name
        for name in sorted(info["unexpected_keys"])
    ]
    other = [
        f"{name} (found {_size(found)}, wanted {_size(size)})"
        for name, found, size in sorted(info["mismatched_keys"])
    ]
    other += [
        f"{name} (found {shape_of(tensor)}, wanted {shape_of(state[name])})"
        for name, tensor in tensors.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    return faults(missing, unknown, other)


def load(architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The model with the weights of a state dict that fits, as `from_pretrained` loads them.

    Args:
        architecture: The class and its configuration.
        tensors: The state dict.
        dtype: What the model computes in.

    Returns:
        The model on the CPU, in train mode, with memory of its own.
    """
    model, _ = _pretrained(architecture, dict(tensors), dtype)
    for own in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        own.data = own.data.clone()  # what was mapped from a file would change with it
    return model.train()


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any] | None:
    """What the model is called with: images, clips, tokens or sound of the size its configuration names.

    Args:
        model: A model of transformers, rewired or not.
        batch: Number of inputs.

    Returns:
        Keyword arguments; None where they can't be told.
    """
    return inputs_for(model, _own_class(model), batch)


def sized_inputs(model: nn.Module, size: Sequence[int], batch: int = 2) -> dict[str, Any]:
    """The same, with the images or clips of another size: channels, height and width, frames first for a clip."""
    made = example_inputs(model, batch) or {}
    name = next((name for name in made if name.startswith("pixel_values")), None)
    if name is None:
        raise RevwireError(f"a {type(model).__name__} takes no images: it has no --input-size")
    noise = Noise().normal((batch, *size))
    return {**made, name: noise.to(made[name])}


def describe(model: nn.Module, known: Architecture | None = None) -> Architecture:
    """The class and configuration that build a model of the same shapes; proven on the meta device.

    Args:
        model: A model of transformers, rewired or not.
        known: How the model was built; the configuration it carries now is what counts.

    Raises:
        RevwireError: The configuration builds another model.
    """
    del known
    configuration: Any = model.config
    kind = _own_class(model)
    config = json.loads(configuration.to_json_string(use_diff=True))
    found = Architecture(kind.__name__, {**config, "architectures": [kind.__name__]}, LIBRARY)
    if fault := next(differences(model, found.outline()), None):
        raise RevwireError(
            f"cannot tell how this {kind.__name__} was built: its config builds another model, {fault}; "
            f"set model.config to what was changed, or pass arch= and model_args="
        )
    return found


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict under the names, and without the ties, with which `save_pretrained` writes it."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    with alone():
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        return cast("Mapping[str, Tensor]", revert_weight_conversion(model, state))


def recipe(architecture: Architecture, out: Path) -> str:
    """The call by which transformers loads the checkpoint."""
    folder = out.parent if out.suffix == ".safetensors" else out
    return f"transformers.{architecture.name}.from_pretrained({str(folder)!r})"


def companions(architecture: Architecture) -> Mapping[str, str]:
    """The files that belong beside the weights: the configuration."""
    return {"config.json": json.dumps(dict(architecture.model_args), indent=2) + "\n"}


def _pretrained(
    architecture: Architecture, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model as `from_pretrained` makes it of a state dict, and what it says about the names."""
    kind, configuration = parts(architecture.name, architecture.model_args)
    with alone(), torch.random.fork_rng(devices=[]):
        try:
            model, info = kind.from_pretrained(
                None,
                config=configuration,
                state_dict=tensors,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            raise unbuildable(architecture.name, error) from error
    return model, info


def _own_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of, which rewiring puts its own before."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == LIBRARY)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
