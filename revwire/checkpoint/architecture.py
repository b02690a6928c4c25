"""Which architecture a checkpoint belongs to: told by the caller, the file, the config beside it, or the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire import timm_models
from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.identify import arguments_of, identify, near
from revwire.checkpoint.metadata import parse_json
from revwire.errors import CheckpointError, RevwireError
from revwire.timm_models import Architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from revwire.checkpoint.reader import Source

_NAMED = 5  # how many near architectures a message names


def resolve(
    source: Source, arch: str | None = None, model_args: Mapping[str, Any] | None = None
) -> Architecture:
    """Find out how the model of a checkpoint is built.

    Args:
        source: The opened checkpoint.
        arch: timm's name of the model; what the file says is then ignored.
        model_args: Arguments of `timm.create_model`; without `arch` they go over those the file names, and where
            they are left out, classes, channels and input size are read off the tensors.

    Returns:
        An architecture whose name timm knows; whether the tensors fit it is not looked at.

    Raises:
        CheckpointError: Nothing says which architecture it is, several fit that compute different functions, or
            timm has none of that name.
    """
    architecture: Architecture | None
    if arch:
        if model_args is None and timm_models.exists(arch):
            model_args = arguments_of(arch, source.tensors)
        architecture = Architecture(arch, dict(model_args or {}))
    else:
        architecture = next((found for find in _FINDERS if (found := find(source)) is not None), None)
        if architecture and model_args:
            architecture = Architecture(architecture.name, {**architecture.model_args, **model_args})
    if architecture is None:
        raise CheckpointError(
            f"cannot tell the architecture of {source.path}: neither its metadata nor a config.json of timm "
            f"beside it names one, and {_unlike(source)}; pass arch= (--arch), and model_args= (--model-args) "
            f"if it has any"
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
        found = timm_models.from_config(config)
    except RevwireError as error:
        raise CheckpointError(f"{path}: {error}") from error
    kind = config.get("model_type")
    if found is None and isinstance(kind, str):
        raise CheckpointError(
            f"{path} is of a transformers model, {kind[:50]!r}, which convert does not build; load it with "
            f"transformers and call revwire.rewire, or pass arch= (--arch) if the tensors are timm's"
        )
    return found


def _from_tensors(source: Source) -> Architecture | None:
    """What the tensors' names and shapes fit, if that is one function."""
    found = identify(source.tensors)
    if len(found.choices) > 1:
        raise CheckpointError(
            f"{source.path} fits {len(found.choices)} architectures whose tensors are alike but not what they "
            f"compute: {found.in_words()}; choose with arch= (--arch), its name alone is enough"
        )
    return found.only


def _unlike(source: Source) -> str:
    """Why the tensors did not tell."""
    known = f"of the {len(index().architectures)} architectures that timm {index().timm} has"
    names = near(source.tensors)
    if not names:
        return f"its tensors are not those of any {known}"
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{known} none has tensors of these shapes; the names are those of {', '.join(names[:_NAMED])}{rest}"
    )


# In the order they are asked; the first that knows an architecture is believed.
_FINDERS: tuple[Callable[[Source], Architecture | None], ...] = (_from_metadata, _from_config, _from_tensors)
