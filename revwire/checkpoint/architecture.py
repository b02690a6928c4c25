"""Which architecture a checkpoint belongs to: told by the caller, by the file, or by the config beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire import timm_models
from revwire.checkpoint.metadata import parse_json
from revwire.errors import CheckpointError, RevwireError
from revwire.timm_models import Architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from revwire.checkpoint.reader import Source


def resolve(
    source: Source, arch: str | None = None, model_args: Mapping[str, Any] | None = None
) -> Architecture:
    """Find out how the model of a checkpoint is built.

    Args:
        source: The opened checkpoint.
        arch: timm's name of the model; what the file says is then ignored.
        model_args: Arguments of `timm.create_model`; without `arch` they go over those the file names.

    Returns:
        An architecture whose name timm knows; whether the tensors fit it is not looked at.

    Raises:
        CheckpointError: Nothing says which architecture it is, or timm has none of that name.
    """
    architecture: Architecture | None
    if arch:
        architecture = Architecture(arch, dict(model_args or {}))
    else:
        architecture = next((found for find in _FINDERS if (found := find(source)) is not None), None)
        if architecture and model_args:
            architecture = Architecture(architecture.name, {**architecture.model_args, **model_args})
    if architecture is None:
        raise CheckpointError(
            f"cannot tell the architecture of {source.path}: neither its metadata nor a config.json of timm "
            f"beside it names one; pass arch= (--arch), and model_args= (--model-args) if it has any"
        )
    if not timm_models.exists(architecture.name):
        raise CheckpointError(f"{source.path}: {timm_models.unknown_name(architecture.name)}")
    return architecture


def _from_metadata(source: Source) -> Architecture | None:
    """The keys `architecture` and `model_args` of the file's own metadata, as revwire writes them."""
    name = source.metadata.get("architecture")
    if not name:
        return None
    what = f"{source.path}: model_args in its metadata"
    return Architecture(name, parse_json(source.metadata.get("model_args") or "{}", what))


def _from_config(source: Source) -> Architecture | None:
    """The `config.json` beside the file, as timm's models have one on the Hugging Face hub."""
    path = source.path.with_name("config.json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    config = parse_json(text, str(path))
    try:
        return timm_models.from_config(config)
    except RevwireError as error:
        raise CheckpointError(f"{path}: {error}") from error


# In the order they are asked; the first that knows an architecture is believed.
_FINDERS: tuple[Callable[[Source], Architecture | None], ...] = (_from_metadata, _from_config)
