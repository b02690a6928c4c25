"""A checkpoint's tensors put into its architecture: each tensor has its place, each place its tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from revwire.errors import CheckpointError, RevwireError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from revwire.libraries import Architecture

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
    return architecture.load(tensors, dtype)


def check_fit(architecture: Architecture, tensors: Mapping[str, Tensor], what: str) -> None:
    """Compare names, shapes and kinds of number with what the architecture has.

    Args:
        architecture: What the tensors should fit.
        tensors: The state dict.
        what: Where the tensors come from, for the message.

    Raises:
        CheckpointError: They differ; the first few differences are named, the rest counted.
    """
    try:
        found = architecture.misfit(tensors)
    except RevwireError as error:
        raise CheckpointError(f"{what}: {error}") from error
    if found:
        raise CheckpointError(
            f"{what} does not fit {architecture}: {found}; pass the architecture (arch=, --arch) and the "
            f"arguments (model_args=, --model-args) it was trained with"
        )


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one floating dtype of the tensors; float32 where there are several, or a storage one (float8)."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return dtype if dtype in _COMPUTES_IN else torch.float32
