"""The model that a command names: one of a library by name, a checkpoint, or one on the Hugging Face hub.

Imported by the commands when they run, for it loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from revwire import checkpoint, libraries
from revwire.checkpoint.hub import is_hub
from revwire.errors import RevwireError
from revwire.libraries import INDEXED, Architecture
from revwire.pytree import tree_map

if TYPE_CHECKING:
    from torch import Tensor, nn

_FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"}


def open_model(
    model: str, arch: str | None, model_args: dict[str, Any] | None
) -> tuple[nn.Module, str, bool | int]:
    """The model that MODEL names, not rewired; the coupling and the grid it is to be rewired with.

    Args:
        model: A name, of which a folder that happens to have it is no other; or a file, a folder, `hf-hub:NAME`.
        arch: Name of the model in a file.
        model_args: Arguments that its library builds it with.
    """
    path = Path(model)
    named = Architecture.of(model, model_args)
    by_name = named.library in INDEXED and not arch and named.exists()
    if path.is_file() or path.suffix in _FILE_SUFFIXES or arch or is_hub(model):
        by_name = False
    elif not by_name and not path.is_dir():
        raise RevwireError(f"there is no file {model}, and {named.unknown()}")
    if by_name:
        torch.manual_seed(0)  # random weights, but the same ones every time: so are the figures
        return named.build(), "re2tal", False
    network, own = checkpoint.load_plain(model, arch=arch, model_args=model_args)
    return (network, own.coupling, own.exact) if own else (network, "re2tal", False)


def inputs_of(network: nn.Module, size: tuple[int, ...] | None) -> Any | None:
    """Inputs of a size; None for the model's own."""
    return libraries.sized_inputs(network, size) if size else None


def batch_of(network: nn.Module, name: str, size: tuple[int, ...] | None, batch: int) -> Any:
    """So many inputs of the model, of shapes alone."""
    example = inputs_of(network, size) if size else libraries.example_inputs(network)
    if example is None:
        raise RevwireError(f"the size of {name}'s input is not known; pass --input-size 3x224x224")

    def of_the_batch(leaf: Tensor) -> Tensor:
        return torch.empty((batch, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")

    return tree_map(lambda leaf: of_the_batch(leaf) if isinstance(leaf, torch.Tensor) else leaf, example)
