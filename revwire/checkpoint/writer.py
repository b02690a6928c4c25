"""Rewired checkpoints, written whole or not at all: tensors as they are, the rewiring in the metadata."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_out(out: Path, source: Path | None = None) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        out: Where the checkpoint is to be written.
        source: The file it is made from, which is never overwritten.

    Raises:
        CheckpointError: `out` is a folder, lies in none, is not named `*.safetensors`, or is `source`.
    """
    try:
        if out.is_dir():
            raise CheckpointError(f"cannot write {out}: it is a folder; name a file in it")
        if out.suffix != ".safetensors":
            raise CheckpointError(
                f"cannot write {out}: revwire writes safetensors files, name it *.safetensors"
            )
        if not out.parent.is_dir():
            raise CheckpointError(f"cannot write {out}: the folder {out.parent} does not exist")
        if source is not None and out.exists() and out.samefile(source):
            raise CheckpointError(f"{out} is the input itself; name another output (-o, out=)")
    except (OSError, ValueError) as error:  # such as a folder we may not look into
        raise CheckpointError(f"cannot write {out}: {error}") from error


def write(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: what stands at `out` is the old file or the whole new one.

    Tensors that share memory are written each in full, since the format knows no sharing; dtype and bits are
    kept.

    Args:
        out: The file.
        tensors: What to write, on any device.
        metadata: Text by key.

    Raises:
        CheckpointError: A tensor has no bytes to write, or the disk refuses.
    """
    plain = _unshared(tensors)
    try:
        # A folder of its own beside `out`: on the same disk, so that the last move is one step, and removed
        # whatever happens, a keyboard interrupt included.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".revwire-") as folder:
            part = Path(folder) / out.name
            save_file(plain, part, metadata=dict(metadata))
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            usual = Path(folder) / "usual"  # safetensors writes for the owner alone; others may read as usual
            usual.touch()
            shutil.copymode(usual, part)
            part.replace(out)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, on the CPU, no two of one storage."""
    plain: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"cannot write {name}: it is {'without data' if tensor.is_meta else 'sparse or sharded'}; "
                f"gather the whole state dict on one process first"
            )
        whole = tensor.detach().cpu().contiguous()
        address = whole.untyped_storage().data_ptr()
        plain[name] = whole.clone() if address in seen else whole
        seen.add(address)
    return plain
