"""Rewired models from files and back: `load` one ready to train, `save` one in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revwire import api, libraries
from revwire.checkpoint.architecture import build, check_filled, check_fit, common_dtype, resolve, warn_filled
from revwire.checkpoint.metadata import rewiring_metadata, rewiring_of
from revwire.checkpoint.reader import read
from revwire.checkpoint.writer import check_out, write
from revwire.errors import CheckpointError, RevwireError, RewireError
from revwire.libraries import Architecture
from revwire.rewrite import wired
from revwire.run.coupling import coupling_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from revwire.run.options import Fallback

# Where a model keeps how it was built: a plain attribute, which deepcopy takes along and state_dict does not.
_BUILT_AS = "_revwire_architecture"


def load(path: str | Path, *, device: str | torch.device = "cpu", fallback: Fallback = "error") -> nn.Module:
    """Load a rewired checkpoint, as `convert` or `save` wrote it.

    Args:
        path: The file.
        device: Where the model goes.
        fallback: What a call does that cannot be rewired, as for `revwire.rewire`.

    Returns:
        The rewired model with the file's weights, in their dtype, in train mode.

    Raises:
        CheckpointError: The file cannot be read, was not written by revwire, or does not fit its model.
    """
    path = Path(path)
    source = read(path)
    plan = rewiring_of(source.metadata, path)
    architecture = resolve(source)
    tensors = source.tensors_for(architecture.library)
    model, fit = build(architecture, tensors, str(path), common_dtype(tensors))
    check_filled(fit, plan, str(path))
    warn_filled(fit, path)
    try:
        api.rewire(model, coupling=plan.coupling, exact=plan.exact, plan=plan, fallback=fallback)
    except RewireError as error:
        raise CheckpointError(
            f"{path}: its plan does not fit {architecture} as this version of its library builds it ({error}); "
            f"convert the original checkpoint again"
        ) from error
    model.__dict__[_BUILT_AS] = architecture
    return model.to(device)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    arch: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write a rewired model as a checkpoint that `load` reads, replacing an older file in one step.

    Args:
        model: The rewired model; it may be in training, on any device.
        path: The file, named `*.safetensors`.
        arch: Name of the model, `resnet50` of timm or `torchvision/resnet50`; when left out, what `load` read, or
            what the model itself tells.
        model_args: Arguments that the library builds it with, which go with `arch`.

    Raises:
        CheckpointError: The model is not rewired, its architecture can't be told, or the disk refuses.
    """
    path = Path(path)
    check_out(path)
    plan = wired.plan_of(model)
    options = wired.options_of(model)
    if plan is None or options is None:
        raise CheckpointError(
            f"this {type(model).__name__} is not rewired: call revwire.rewire first, "
            f"and pass the model itself, not a wrapper such as DistributedDataParallel"
        )
    coupling = options.coupling  # not the plan's: a schedule may have moved it since
    try:
        known = coupling_of(coupling.spec)
    except RewireError:
        known = None
    if known != coupling:
        raise CheckpointError(
            f"{coupling!r} is a coupling of your own, which no file can name; "
            f"use revwire.Coupling({coupling.a}, {coupling.b}, {coupling.c}), or save the state_dict"
        )
    plan = replace(plan, coupling=coupling.spec)
    if model_args and not arch:
        raise CheckpointError("model_args= belongs to arch=: pass the name of the model with it")
    architecture = Architecture.of(arch, model_args) if arch else _known(model)
    tensors = libraries.library(architecture.library).tensors_of(model)
    if arch:
        check_fit(architecture, tensors, f"this {type(model).__name__}")
    write(path, tensors, rewiring_metadata(architecture, plan))


def _known(model: nn.Module) -> Architecture:
    """How the model was built, as `load` remembers it or its library tells, and as it was changed since."""
    try:
        return libraries.describe(model, model.__dict__.get(_BUILT_AS))
    except RevwireError as error:
        raise CheckpointError(str(error)) from error
