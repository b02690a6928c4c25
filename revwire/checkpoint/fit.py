"""A checkpoint's tensors put into its architecture: each tensor has its place, each place its tensor."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from revwire.errors import CheckpointError, RevwireError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from revwire.timm_models import Architecture

_NAMED = 3  # how many faults of each kind a message names; the rest is counted
_COMPUTES_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build(
    architecture: Architecture, tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype
) -> nn.Module:
    """Build the architecture and load the tensors into it.

    The fit is checked on the meta device first: a wrong architecture costs no memory, however large. Tensors
    are copied one by one, so mapped ones are never in memory twice. The global random state stays as it was.

    Args:
        architecture: What to build.
        tensors: The state dict.
        what: Where the tensors come from, for messages.
        dtype: What the model computes in.

    Returns:
        The model on the CPU, in train mode.

    Raises:
        CheckpointError: The architecture cannot be built, or the tensors do not fit it.
    """
    check_fit(architecture, tensors, what)
    with torch.random.fork_rng(devices=[]):
        model = architecture.build()
    model.to(dtype)
    model.load_state_dict(tensors, strict=False)  # strictness, and its exceptions, are check_fit's
    return model


def check_fit(architecture: Architecture, tensors: Mapping[str, Tensor], what: str) -> None:
    """Compare names, shapes and kinds of number with what the architecture has.

    A name may be missing where the model ties it to one that is there (safetensors stores tied tensors once),
    and so may a BatchNorm's batch counter, which old checkpoints lack and torch starts from 0.

    Args:
        architecture: What the tensors should fit.
        tensors: The state dict.
        what: Where the tensors come from, for the message.

    Raises:
        CheckpointError: They differ; the first few differences are named, the rest counted.
    """
    try:
        outline = architecture.outline()
    except RevwireError as error:
        raise CheckpointError(f"{what}: {error}") from error
    if found := misfit(outline, tensors):
        raise CheckpointError(
            f"{what} does not fit {architecture}: {found}; pass the architecture (arch=, --arch) and the "
            f"arguments (model_args=, --model-args) it was trained with"
        )


def misfit(outline: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The first few differences between a model and a state dict, in words; empty where it fits.

    Args:
        outline: The model, on any device.
        tensors: The state dict.
    """
    wanted = outline.state_dict(keep_vars=True)
    ties = defaultdict(set)
    for name, tensor in wanted.items():
        ties[id(tensor)].add(name)
    missing = [
        f"{name} ({_shape(tensor)})"
        for name, tensor in wanted.items()
        if ties[id(tensor)].isdisjoint(tensors) and not name.endswith("num_batches_tracked")
    ]
    unknown = [f"{name} ({_shape(tensor)})" for name, tensor in tensors.items() if name not in wanted]
    other = [
        f"{name} (found {_shape(tensor)}, wanted {_shape(wanted[name])})"
        for name, tensor in tensors.items()
        if name in wanted and _kind(tensor) != _kind(wanted[name])
    ]
    faults = {"missing": missing, "not in the architecture": unknown, "of another shape": other}
    return "; ".join(f"{kind}: {_first(names)}" for kind, names in faults.items() if names)


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one floating dtype of the tensors; float32 where there are several, or a storage one (float8)."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return dtype if dtype in _COMPUTES_IN else torch.float32


def _kind(tensor: Tensor) -> tuple[torch.Size, bool, bool]:
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def _shape(tensor: Tensor) -> str:
    """`1x197x48`; the dtype too where it is not the usual floating one."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
