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
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OF_DEEPSPEED = "mp_rank_00_model_states.pt"
"""The weights in a folder of DeepSpeed's, where one process had them all."""

_LATEST = "latest"
_TAG = 200  # characters of the name of a folder within a folder


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
    for name in (*_FILES, *_OPEN_CLIP):
        if (folder / name).is_file():
            return folder / name
    if any((folder / name).is_file() for name in _ADAPTERS):
        raise CheckpointError(f"{folder} holds an adapter without its model{merging(folder)}")
    if (found := _of_deepspeed(folder)) is not None:
        return found
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} holds a model in the pieces of several processes: join them with python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth (Accelerate's FSDP: accelerate "
            f"merge-weights), and convert that"
        )
    raise CheckpointError(
        f"{folder} is a folder: name the checkpoint file in it ({' or '.join(_FILES)} would be found)"
    )


def merging(folder: Path) -> str:
    """What to do with an adapter in a folder: merge it into its base, which its own configuration names."""
    base = None
    try:
        path = folder / "adapter_config.json"
        base = parse_json(text_of(path, JSON_CHARACTERS), str(path)).get("base_model_name_or_path")
    except (FileNotFoundError, CheckpointError):
        pass  # then it is the user who knows its base
    of = (
        f"its base model ({base[:100]}, says adapter_config.json)"
        if isinstance(base, str) and base
        else "the weights"
    )
    return (
        f": merge it into {of} first, with peft model = model.merge_and_unload(), and save that model; or convert the "
        f"base model, and put a new adapter on the rewired one"
    )


def _of_deepspeed(folder: Path) -> Path | None:
    """The weights in a folder as DeepSpeed saves one: in the folder itself, or in the one that `latest` names."""
    try:
        tag = text_of(folder / _LATEST, _TAG).strip()
    except FileNotFoundError:
        tag = "."
    if not tag or "\0" in tag or tag == ".." or (Path(tag).name != tag and tag != "."):
        raise CheckpointError(f"{folder / _LATEST} names {tag[:100]!r}, which is no folder beside it")
    inside = folder / tag
    if not inside.is_dir():
        return None
    own = sorted(path.name for path in inside.glob("*mp_rank_*_model_states.pt"))
    if not own:
        return None
    if own != [OF_DEEPSPEED]:
        raise CheckpointError(
            f"{inside} holds a model in the pieces of several processes ({len(own)} files such as {own[0]}): join them "
            f"with the zero_to_fp32.py that DeepSpeed left there, python zero_to_fp32.py . OUT, and convert OUT"
        )
    return inside / OF_DEEPSPEED


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
