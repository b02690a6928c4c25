"""What revwire knows about Hugging Face transformers: a model built from its configuration, its inputs, its files.

With the other files of that name the only transformers-specific code. An architecture is a class of
transformers with the `config.json` as its arguments. Files are read as `from_pretrained` reads a state dict.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from revwire.errors import RevwireError
from revwire.libraries.comparison import differences
from revwire.libraries.interface import MARK, Architecture
from revwire.libraries.noise import Noise
from revwire.libraries.plain_library import from_training, respelled
from revwire.libraries.transformers_classes import class_of, is_old, kind_of
from revwire.libraries.transformers_config import (
    LIBRARY,
    alone,
    config_class,
    installed,
    model_class,
    refuse,
    unknown_class,
)
from revwire.libraries.transformers_fit import create, fit, load
from revwire.libraries.transformers_inputs import inputs_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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


def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture that a `config.json` of transformers describes.

    Args:
        config: The parsed file.
        tensors: The state dict beside it, which tells what the file leaves out.

    Returns:
        The class that `architectures` names, or the one that the tensors' names and shapes fit best; None where the
        configuration is not one of transformers.

    Raises:
        RevwireError: An entry has the wrong type, nothing of the name is known, the configuration wants code of its own
            to be run, its weights are quantised, the tensors do not tell, or transformers is not installed.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    if kind is None and named is None and not is_old(config):
        return None
    if kind is not None and not isinstance(kind, str):
        raise RevwireError(f"model_type must be a string, not {str(kind)[:50]}")
    if named is not None and not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise RevwireError(f"architectures must be a list of class names, not {str(named)[:50]}")
    refuse(config)
    if named:
        return with_config(named[0], config)
    kind = kind or kind_of(config, tensors)
    config_class(kind)
    return with_config(class_of(kind, config, tensors), config)


def with_config(name: str, config: Mapping[str, Any]) -> Architecture:
    """A class with its configuration, which gets its `model_type` where it was written without.

    Args:
        name: The class; whether there is one is not looked at.
        config: The parsed `config.json`, or those of its entries that are not as the class has them by itself.
    """
    kind = model_class(name)
    own = getattr(getattr(kind, "config_class", None), "model_type", None)
    told = {key: value for key, value in config.items() if key != MARK}
    return Architecture(name, {**({"model_type": own} if own else {}), **told}, LIBRARY)


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
    config.pop(MARK, None)
    found = Architecture(kind.__name__, {**config, "architectures": [kind.__name__]}, LIBRARY)
    if fault := next(differences(model, found.outline()), None):
        raise RevwireError(
            f"cannot tell how this {kind.__name__} was built: its config builds another model, {fault}; "
            f"set model.config to what was changed, or pass arch= and model_args="
        )
    return found


def settings_of(model: nn.Module) -> Any | None:
    """The config, which `save_pretrained` writes with all its attributes."""
    config = getattr(model, "config", None)
    return config if isinstance(config, installed().PretrainedConfig) else None


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict under the names, and without the ties, with which `save_pretrained` writes it."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    with alone():
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        return cast("Mapping[str, Tensor]", revert_weight_conversion(model, state))


def recipe(architecture: Architecture, out: Path, fit: Fit) -> str:
    """The call by which transformers loads the checkpoint."""
    del fit
    folder = out.parent if out.suffix == ".safetensors" else out
    return f"transformers.{architecture.name}.from_pretrained({str(folder)!r})"


def companions(architecture: Architecture) -> Mapping[str, str]:
    """The files that belong beside the weights: the configuration."""
    return {"config.json": json.dumps(dict(architecture.model_args), indent=2) + "\n"}


def _own_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of, which rewiring puts its own before."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == LIBRARY)
