"""The configuration of a model of Hugging Face transformers: read as data from outside, and the class it is for.

No code of a checkpoint is run and no network is touched: classes are transformers' own, and entries of a configuration
that would fetch something are refused or left out.
"""

from __future__ import annotations

import difflib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError
from revwire.libraries.interface import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LIBRARY = "transformers"
# Entries that name code or kernels to fetch, other files, or how to compute; what they describe is no architecture.
_LEFT_OUT = {
    "attn_implementation",
    "experts_implementation",
    "distributed_config",
    "fusion_config",
    "transformers_weights",
    "name_or_path",
    "dtype",
    "torch_dtype",
    MARK,
}
_COUNTS_LAYERS = re.compile(r"(layers?|depths?|blocks?)$")
_MOST_LABELS = 2**20


def installed() -> Any:
    """The library.

    Raises:
        RevwireError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RevwireError(
            "this is a checkpoint of Hugging Face transformers, which is not installed: "
            "pip install 'revwire[transformers]'"
        ) from error
    return transformers


def model_class(name: str) -> Any | None:
    """The model class of a name, of transformers' own."""
    transformers = installed()
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def unknown_class(name: str) -> str:
    """The words for a class transformers does not have."""
    return f"transformers {installed().__version__} has no model class {name[:100]!r}; a newer version may have it"


def config_class(kind: str) -> Any:
    """The class of a `model_type`'s configuration.

    Raises:
        RevwireError: transformers has no such type; the message names near ones.
    """
    transformers = installed()
    if kind in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[kind]
    near = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "a newer version may have it"
    raise RevwireError(f"transformers {transformers.__version__} has no model_type {kind[:100]!r}; {hint}")


def parts(name: str, model_args: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a name and its configuration, made without what would fetch anything."""
    kind = model_class(name)
    if kind is None:
        raise RevwireError(unknown_class(name))
    model_type = model_args.get("model_type")
    if not isinstance(model_type, str):
        raise RevwireError(f"model_args of {LIBRARY}/{name} must be a config.json, with its model_type")
    refuse(model_args)
    own = config_class(model_type)
    wanted = kind.config_class
    if wanted is None or not (issubclass(own, wanted) or issubclass(wanted, own)):
        raise RevwireError(f"{name} is no model of model_type {model_type!r}")
    with alone():
        try:
            return kind, own.from_dict(_without(dict(model_args)))
        except Exception as error:  # validation, and whatever wrong types lead to
            raise unbuildable(name, error) from error


def refuse(config: Mapping[str, Any]) -> None:
    """What no model is built from: code in the checkpoint, and weights that are no plain numbers."""
    if "auto_map" in config:
        raise RevwireError(
            f"it names code of its own to run (auto_map: {str(config['auto_map'])[:100]}), which is never done; load "
            f"it with transformers and call revwire.rewire, or take auto_map out if the class is transformers' own"
        )
    if config.get("quantization_config") is not None:
        raise RevwireError("its weights are quantised: dequantise them first, or load it with transformers")


def _without(config: Any) -> Any:
    """A configuration without the entries that are no part of an architecture, at any depth."""
    if isinstance(config, dict):
        return {
            key: False if key == "use_pretrained_backbone" else _without(value)
            for key, value in config.items()
            if not key.startswith("_") and key not in _LEFT_OUT
        }
    return [_without(each) for each in config] if isinstance(config, list) else config


def check_counts(config: Any, tensors: int) -> None:
    """Refuse numbers of layers and labels that would be built one by one, and can't be in the file.

    Raises:
        RevwireError: There are more layers than tensors, or more than a million labels.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            counts = value if isinstance(value, list) else [value]
            most = max((n for n in counts if isinstance(n, int)), default=0)
            if _COUNTS_LAYERS.search(key) and most > tensors:
                raise RevwireError(f"its config.json says {key}: {most}, and the file has {tensors} tensors")
            if key == "num_labels" and most > _MOST_LABELS:
                raise RevwireError(
                    f"its config.json says {key}: {most}, and at most {_MOST_LABELS} are built"
                )
            check_counts(value, tensors)


def unbuildable(name: str, error: Exception) -> RevwireError:
    """What transformers raised on a configuration, in one line."""
    return RevwireError(
        f"transformers cannot build {LIBRARY}/{name} as its config.json says: {type(error).__name__}: "
        f"{str(error)[:300]}"
    )


@contextmanager
def alone() -> Iterator[None]:
    """No network, no progress bars and no reports on stderr, for the length of a block."""
    import huggingface_hub

    logging = installed().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
