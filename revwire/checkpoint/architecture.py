"""Which architecture a checkpoint belongs to: told by the caller, the file, the config beside it, or the tensors.

And building it with the tensors put in, where every tensor must have a place and every place a tensor.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import torch

from revwire.checkpoint.disk import text_of
from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.folder import OF_DEEPSPEED, merging
from revwire.checkpoint.identify import arguments_of, identify, near
from revwire.checkpoint.limits import JSON_CHARACTERS, built_within, check_arguments
from revwire.checkpoint.metadata import parse_json
from revwire.errors import CheckpointError, RevwireError
from revwire.libraries import INDEXED, Architecture, from_config, library, respelled
from revwire.printing import first_few

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from revwire.checkpoint.reader import Source
    from revwire.libraries.fit import Fit
    from revwire.planning.plan import Plan

_NAMED = 5  # how many near architectures, or parameters, a message names
# What peft and others call the tensors of an adapter.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|ia3_l|hada_w\w+|oft_[rs]|boft_[rs])(\.|$)")


def resolve(
    source: Source, arch: str | None = None, model_args: Mapping[str, Any] | None = None
) -> Architecture:
    """Find out how the model of a checkpoint is built.

    Args:
        source: The opened checkpoint.
        arch: Name of the model, `resnet50` of timm or `torchvision/resnet50`; what the file says is then ignored.
        model_args: Arguments of its library; without `arch` they go over those the file names, and where they are
            left out, classes, channels and input size are read off the tensors.

    Returns:
        An architecture whose name its library knows; whether the tensors fit it is not looked at.

    Raises:
        CheckpointError: Nothing says which architecture it is, several fit that compute different functions, its
            library has none of that name, or the tensors are those of an adapter.
    """
    architecture: Architecture | None
    if adapter := next((name for name in source.tensors if _ADAPTER.search(name)), None):
        raise CheckpointError(
            f"{source.path} holds an adapter that is not merged ({adapter[:100]}){merging(source.path.parent)}"
        )
    if arch:
        architecture = _named(source, arch, model_args)
    else:
        architecture = next((found for find in _FINDERS if (found := find(source)) is not None), None)
        if architecture and model_args:
            architecture = Architecture.of(architecture.spec, {**architecture.model_args, **model_args})
    if architecture is None:
        raise CheckpointError(
            f"cannot tell the architecture of {source.path}: neither its metadata nor a config.json "
            f"beside it names one, and {_unlike(source)}; pass arch= (--arch), and model_args= (--model-args) "
            f"if it has any"
        )
    try:
        if not architecture.exists():
            raise CheckpointError(f"{source.path}: {architecture.unknown()}")
    except RevwireError as error:  # its library is not installed
        raise CheckpointError(str(error)) from error
    return architecture


def _named(source: Source, arch: str, model_args: Mapping[str, Any] | None) -> Architecture:
    """The architecture that the caller named, with what the tensors or the config beside them tell of it."""
    architecture = Architecture.of(arch, model_args)
    try:
        if not architecture.exists():
            return architecture
        if architecture.library not in INDEXED:
            return _configured(source, architecture)
        if model_args is not None:
            return architecture
        own = arguments_of(architecture, source.tensors)
        if own is None and (other := respelled(architecture.library, source.tensors)):
            own = arguments_of(architecture, other)
        return Architecture.of(arch, own)
    except RevwireError as error:  # its library is not installed, or the config beside the file is none
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error


def _configured(source: Source, architecture: Architecture) -> Architecture:
    """The architecture with the configuration beside the file, where it takes one and was told none."""
    given = architecture.model_args
    if "model_type" in given:
        return architecture
    _, config = _config_beside(source)
    if config is None and not given:
        raise CheckpointError(
            f"{source.path}: {architecture.spec} is built from a configuration, and no config.json lies beside the "
            f"file; put it there, or pass its entries as model_args= (--model-args)"
        )
    own = library(architecture.library)
    return own.with_config(architecture.name, {**(config or {}), **given}) or architecture


def _from_metadata(source: Source) -> Architecture | None:
    """The keys `architecture` and `model_args` of the file's own metadata, as revwire writes them."""
    name = source.metadata.get("architecture")
    if not name:
        return None
    what = f"{source.path}: model_args in its metadata"
    return Architecture.of(name, parse_json(source.metadata.get("model_args") or "{}", what))


def _from_config(source: Source) -> Architecture | None:
    """The `config.json` beside the file, as models of timm and transformers have one on the Hugging Face hub."""
    path, config = _config_beside(source)
    if config is None:
        return None
    tensors = source.named_in_file
    try:
        with built_within(tensors, str(path)):
            return from_config(config, tensors)
    except CheckpointError:
        raise
    except RevwireError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _config_beside(source: Source) -> tuple[Path, dict[str, Any] | None]:
    """The `config.json` beside the file, parsed; of a folder of DeepSpeed's the one beside that folder."""
    path = source.path.with_name("config.json")
    if not path.exists() and (above := source.path.parent.with_name("config.json")).exists():
        path = above if source.path.name == OF_DEEPSPEED else path
    try:
        return path, parse_json(text_of(path, JSON_CHARACTERS), str(path))
    except FileNotFoundError:
        return path, None


def _from_tensors(source: Source) -> Architecture | None:
    """What the tensors' names and shapes fit, if that is one function."""
    found = identify(source.tensors)
    if not found.choices:
        others = (respelled(name, source.tensors) for name in INDEXED)
        found = next((each for other in others if other and (each := identify(other)).choices), found)
    if len(found.choices) > 1:
        raise CheckpointError(
            f"{source.path} fits {len(found.choices)} architectures whose tensors are alike but not what they "
            f"compute: {found.in_words()}; choose with arch= (--arch), its name alone is enough"
        )
    return found.only


def _unlike(source: Source) -> str:
    """Why the tensors did not tell."""
    indexes = [index(library) for library in INDEXED]
    known = " and ".join(f"{len(each.architectures)} of {each.library} {each.version}" for each in indexes)
    names = near(source.tensors)
    if not names:
        return f"its tensors are not those of any of the architectures known by them ({known})"
    return (
        f"of the architectures known by their tensors ({known}) none has tensors of these shapes; the names are "
        f"those of {first_few(names, _NAMED)}"
    )


# In the order they are asked; the first that knows an architecture is believed.
_FINDERS: tuple[Callable[[Source], Architecture | None], ...] = (_from_metadata, _from_config, _from_tensors)


# What formats of quantised weights put beside them.
_PARTS = r"qweight|qzeros|absmax|quant_map|quant_state|SCB|weight_packed|\w*qdata|weight_scale\w*|scale_inv"
_QUANTISED = re.compile(rf"(^|[._])({_PARTS})([._]|$)")
_SCALE_OF_NARROW = re.compile(rf"(^|[._])({_PARTS}|scales?)$")
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_COMPUTES_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build(
    architecture: Architecture, tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype
) -> tuple[nn.Module, Fit]:
    """Build the architecture and load the tensors into it, as its library does.

    The fit is checked on the meta device first: a wrong architecture costs no memory, however large. Tensors
    are copied one by one, so mapped ones are never in memory twice. The global random state stays as it was.

    Args:
        architecture: What to build.
        tensors: The state dict.
        what: Where the tensors come from, for messages.
        dtype: What the model computes in.

    Returns:
        The model on the CPU, in train mode, and how the tensors went into it.

    Raises:
        CheckpointError: The architecture cannot be built, or the tensors do not fit it.
    """
    fit = check_fit(architecture, tensors, what)
    return architecture.load(tensors, dtype), fit


def check_fit(architecture: Architecture, tensors: Mapping[str, Tensor], what: str) -> Fit:
    """Compare names, shapes and kinds of number with what the architecture has, as its library's own loading does.

    Args:
        architecture: What the tensors should fit.
        tensors: The state dict.
        what: Where the tensors come from, for the message.

    Returns:
        What goes under another name, is left aside, or is filled.

    Raises:
        CheckpointError: They differ; the first few differences are named, the rest counted.
    """
    # a configuration of transformers has more than counts, and is looked at by its library
    if architecture.library in INDEXED:
        check_arguments(architecture.model_args, tensors, what)
    try:
        with built_within(tensors, what):
            fit = architecture.fit(tensors)
    except RevwireError as error:
        raise CheckpointError(f"{what}: {error}") from error
    if (scale := _scale_in(tensors)) and (fit.faults or scale in fit.carried):
        raise CheckpointError(
            f"{what} holds quantised weights ({scale[:100]} beside them): dequantise them, or convert the file that "
            f"they were quantised from"
        )
    if fit.faults:
        raise CheckpointError(
            f"{what} does not fit {architecture}: {fit.faults}; pass the architecture (arch=, --arch) and the "
            f"arguments (model_args=, --model-args) it was trained with"
        )
    return fit


def check_filled(fit: Fit, plan: Plan, what: str) -> None:
    """Refuse a rewired chain with parameters that the file does not have.

    Raises:
        CheckpointError: There are some; they would be random numbers in the middle of trained ones.
    """
    inside = tuple(f"{step.module}." for step in plan.steps if step.module)
    if found := [f"{name} ({shape})" for name, shape in fit.filled.items() if name.startswith(inside)]:
        raise CheckpointError(
            f"{what} lacks parameters of what would be rewired, and its library would fill them with random numbers: "
            f"{first_few(found, _NAMED)}"
        )


def warn_filled(fit: Fit, path: Path) -> None:
    """Say which parameters of a model that was loaded are random numbers, not the file's."""
    if fit.filled:
        warnings.warn(
            f"{path} does not have {first_few(list(fit.filled), _NAMED)}: they start from random numbers, train them",
            stacklevel=3,
        )


def _scale_in(tensors: Mapping[str, Tensor]) -> str | None:
    """A tensor without which the numbers of quantised weights beside it mean nothing."""
    narrow = any(tensor.dtype in _NARROW for tensor in tensors.values())
    pattern = _SCALE_OF_NARROW if narrow else _QUANTISED
    return next(filter(pattern.search, tensors), None)


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one floating dtype of the tensors; float32 where there are several, or a storage one (float8)."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return dtype if dtype in _COMPUTES_IN else torch.float32
