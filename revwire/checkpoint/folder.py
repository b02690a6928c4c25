"""Folders as the Hugging Face hub has them: which file in one is the checkpoint, and weights in several files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from revwire.checkpoint.disk import text_of
from revwire.checkpoint.limits import JSON_CHARACTERS
from revwire.checkpoint.metadata import parse_json
from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

_INDEXES = (".safetensors.index.json", ".bin.index.json")
# In the order they are preferred.
_FILES = ("model.safetensors", f"model{_INDEXES[0]}", "pytorch_model.bin", f"pytorch_model{_INDEXES[1]}")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def is_index(path: Path) -> bool:
    """Whether a file names others that hold the tensors."""
    return path.name.endswith(_INDEXES)


def stem_of(path: Path) -> str:
    """`model` of `model.safetensors`, `model.pth` and `model.safetensors.index.json`."""
    suffix = next((suffix for suffix in _INDEXES if path.name.endswith(suffix)), path.suffix)
    return path.name.removesuffix(suffix)


def file_in(folder: Path) -> Path:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: It has none of a name known here.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    if any((folder / name).is_file() for name in _ADAPTERS):
        raise CheckpointError(
            f"{folder} holds an adapter without its model: merge it into the weights first, with peft "
            f"model = model.merge_and_unload(), and save that model"
        )
    raise CheckpointError(
        f"{folder} is a folder: name the checkpoint file in it ({' or '.join(_FILES)} would be found)"
    )


def shards(index: Path, names_in: Callable[[Path], list[str]]) -> dict[str, tuple[Path, str]]:
    """Where the tensors of an index file are.

    Args:
        index: The file, `model.safetensors.index.json`, or the same of torch files.
        names_in: The names in one of its files.

    Returns:
        By name: the file beside the index, and the name in it.

    Raises:
        CheckpointError: The index is none, names files elsewhere, or tensors that are not where it says.
    """
    where = parse_json(text_of(index, JSON_CHARACTERS), str(index)).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files: download it again")
    places = {}
    for file in sorted(set(where.values())):
        if file in {"", ".", ".."} or "\0" in file or Path(file).name != file:
            raise CheckpointError(
                f"{index} names {file[:100]!r}, which is not beside it; that is not followed"
            )
        there = set(names_in(index.with_name(file)))
        wanted = {name for name, of in where.items() if of == file}
        if missing := sorted(wanted - there):
            raise CheckpointError(
                f"{index}: {file} has no {missing[0][:100]!r}; it is another checkpoint's: download it again"
            )
        places.update({name: (index.with_name(file), name) for name in wanted})
    return places
