"""Writes rewired checkpoints, complete or not at all: tensors as they are, the rewiring in the metadata."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire.checkpoint.disk import check_regular, written_whole
from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_PIECE = 16 * 2**20  # bytes written at a time
# The format's names of torch's kinds of number, in the order in which safetensors writes them: the widest first, so
# that each begins at a multiple of its width.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


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
        if "\0" in str(out):
            raise CheckpointError(f"cannot write {str(out)!r}: no file can have that name")
        if out.suffix != ".safetensors":
            raise CheckpointError(
                f"cannot write {out}: revwire writes safetensors files, name it *.safetensors"
            )
        if not out.parent.is_dir():
            raise CheckpointError(f"cannot write {out}: the folder {out.parent} does not exist")
        if out.exists():
            check_regular(out)
        if source is not None and out.exists() and out.samefile(source):
            raise CheckpointError(f"{out} is the input itself; name another output (-o, out=)")
    except (OSError, ValueError) as error:  # such as a folder we may not look into
        raise CheckpointError(f"cannot write {out}: {error}") from error


def write(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: what stands at `out` is the old file or the whole new one.

    Tensors are asked for one after another and dropped once written, so no more than one is in memory where the
    mapping reads them from a file. Those that share memory are written each in full, since the format knows no
    sharing; dtype and bits are kept.

    Args:
        out: The file.
        tensors: What to write, on any device.
        metadata: Text by key.

    Raises:
        CheckpointError: A tensor has no bytes to write, or the disk refuses.
    """
    names, head = _header(tensors, metadata)
    with written_whole(out, len(head) + sum(tensors[name].nbytes for name in names)) as file:
        file.write(head)
        for name in names:
            for piece in _bytes_of(tensors[name]):
                file.write(piece)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """The names in the order of their bytes, and what goes before those: a length and a JSON object."""
    sizes = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"cannot write {name}: it is {'without data' if tensor.is_meta else 'sparse or sharded'}; "
                f"gather the whole state dict on one process first"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"cannot write {name}: safetensors has no {tensor.dtype}; convert it first")
        sizes[name] = tensor.dtype, tensor.nbytes, list(tensor.shape)
    names = sorted(sizes, key=lambda name: (_ORDER[sizes[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, nbytes, shape = sizes[name]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    """The bytes in pieces; only a tensor that is not contiguous, or on a device, is copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE].numpy()
