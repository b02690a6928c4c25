"""Checkpoint files read safely: nothing in a file is run, and a bad file is one `CheckpointError`.

Tensors are mapped from the file, not read: a tensor costs memory only where, and when, someone looks at it.
What a file is shows in its first bytes, not in its name.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from revwire import libraries
from revwire.checkpoint.disk import check_regular
from revwire.checkpoint.folder import file_in, is_index, shards
from revwire.checkpoint.limits import check_stored, check_unpacked, is_dense
from revwire.checkpoint.mapped import Mapped
from revwire.checkpoint.metadata import in_config, is_rewired, left_beside
from revwire.errors import CheckpointError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# Where training scripts put the weights, averaged ones first, and what goes before every name.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
_ENTRIES = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module", "net", "params", "weights")
_WRAPPERS = (
    "base_model.model.",
    "model.",
    "timm_model.",
    "ema_model.",
    "model_ema.",
    "ema.",
    "net.",
    "state_dict.",
)
_DEPTH = 8  # entries within each other, of which training scripts make three at most
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# How other files begin that end up under a checkpoint's name, mostly by a download that went wrong.
_OTHER_FILES = {
    b"version https://git-lfs": "a git-lfs pointer: fetch the file itself with `git lfs pull`",
    b"<": "a web page or XML, as a failed download leaves: download it again",
    b"\x89HDF": "an HDF5 file: convert it to safetensors first",
    b"GGUF": "a GGUF file, which holds no trainable weights",
    b"\x93NUMPY": "a NumPy array: convert it to safetensors first",
}


@dataclass(frozen=True)
class Source:
    """An opened checkpoint file.

    Attributes:
        path: The file.
        tensors: Every tensor by name, memory-mapped where the format allows.
        named_in_file: The same under the file's own names, but for the marks that training leaves in them.
        metadata: The safetensors metadata; of timm's training checkpoints, what says how the model was built.
        entry: Which entry of a torch file holds the tensors (`state_dict_ema`); `""` is the file as a whole.
        files: Where the path is an index: the files that hold the tensors.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    named_in_file: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    entry: str = ""
    files: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file, or files."""
        return sum(path.stat().st_size for path in self.files or (self.path,))

    def tensors_for(self, library: str) -> Mapping[str, Tensor]:
        """The tensors under the names that a library knows them by: `model.` is part of transformers' own."""
        return self.named_in_file if library in libraries.OF_THE_HUB else self.tensors


def read(path: str | Path) -> Source:
    """Open a checkpoint: safetensors, or a torch file of tensors only (`weights_only=True`, never otherwise).

    Args:
        path: The file, of any name; an index of several (`*.safetensors.index.json`, `*.bin.index.json`); or a folder
            that has one.

    Returns:
        Its tensors on the CPU and its metadata.

    Raises:
        CheckpointError: There is no such file, or it is not a checkpoint, is damaged, or holds other objects
            than tensors; the message says what was found and what to do.
    """
    source = _read(Path(path))
    if is_rewired(source.metadata):
        return source
    return replace(source, metadata={**source.metadata, **in_config(source.path.with_name("config.json"))})


def _read(path: Path) -> Source:
    try:
        path = file_in(path) if path.is_dir() else path
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    if is_index(path):
        return _read_shards(path) if ".safetensors." in path.name else _read_torch_shards(path)
    head = _head(path)
    if (
        head[8:9] == b"{"
    ):  # after the length of the header, whose bytes can look like the start of anything else
        return _read_safetensors(path)
    for beginning, kind in _OTHER_FILES.items():
        if head.lstrip().startswith(beginning):
            raise CheckpointError(f"{path} is no checkpoint but {kind}")
    if head.startswith((_ZIP, _PICKLE)) or path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path, mmap=head.startswith(_ZIP))
    return _read_safetensors(path)


def _head(path: Path) -> bytes:
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot open {path}: {reason}") from error
    if not head:
        raise CheckpointError(f"{path} is empty: download or save it again")
    return head


def _read_shards(index: Path) -> Source:
    metadata: dict[str, str] = {}

    def names_in(path: Path) -> list[str]:
        _head(path)
        names, own = _contents(path)
        metadata.update(own)
        return names

    places = shards(index, names_in)
    tensors, named = (
        Mapped({new: places[old] for old, new in names.items()}) for names in _both(index, places)
    )
    files = tuple(dict.fromkeys(path for path, _ in places.values()))
    return Source(index, tensors, named, metadata, files=files)


def _read_torch_shards(index: Path) -> Source:
    parts: dict[Path, Mapping[str, Tensor]] = {}

    def names_in(path: Path) -> list[str]:
        _, held = state_dict_in(_loaded(path, mmap=_head(path).startswith(_ZIP)), _ENTRIES)
        parts[path] = _tensors(path, held)
        return list(parts[path])

    merged = {name: parts[path][inside] for name, (path, inside) in shards(index, names_in).items()}
    tensors, named = ({new: merged[old] for old, new in names.items()} for names in _both(index, merged))
    return Source(index, tensors, named, {}, files=tuple(parts))


def _read_safetensors(path: Path) -> Source:
    names, metadata = _contents(path)
    tensors, named = (
        Mapped({new: (path, old) for old, new in names.items()}) for names in _both(path, names)
    )
    return Source(path, tensors, named, metadata)


def _contents(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names and metadata of a safetensors file whose tensors can all be mapped."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            for name in names:
                file.get_tensor(name)  # mapped, not read: what can't be mapped shows here
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({reason}): "
            f"it is truncated, damaged or of another format; download or save it again"
        ) from error
    return names, metadata


def _read_torch(path: Path, *, mmap: bool) -> Source:
    loaded = _loaded(path, mmap=mmap)
    entry, held = state_dict_in(loaded, _ENTRIES)
    state = _tensors(path, held)
    tensors, named = ({new: state[old] for old, new in names.items()} for names in _both(path, state))
    metadata = {**_training_metadata(loaded), **left_beside(held)}
    return Source(path, tensors, named, metadata, entry)


def _loaded(path: Path, *, mmap: bool) -> Any:
    """The content of a torch file, of tensors and plain values."""
    if mmap:
        check_unpacked(path)
    try:
        # argparse.Namespace holds data only, and every training checkpoint of timm has one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can make the restricted unpickler raise anything
        raise _refusal(path, error) from error


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a torch file's state dict."""
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not is_dense(value):
            raise CheckpointError(
                f"{path} is not a state dict: its entry {str(name)[:100]!r} is a {type(value).__name__}, "
                f"not a dense tensor; save the weights alone, torch.save(model.state_dict(), file)"
            )
        tensors[name] = value.detach()
    if not tensors:
        raise CheckpointError(
            f"{path} is no state dict; save the weights, torch.save(model.state_dict(), file)"
        )
    check_stored(path, tensors)
    return tensors


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """In our own words: torch's tell how to load the file with the safety off."""
    text = str(error)
    if found := re.search(r"unsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", text, re.IGNORECASE):
        return CheckpointError(
            f"{path} holds more than tensors ({found[1]}), and unpickling that could run code, so it is "
            f"not read; save the weights alone, torch.save(model.state_dict(), file)"
        )
    unpickler = re.search(r"WeightsUnpickler error: (.*)", text)
    reason = unpickler[1] if unpickler else f"{type(error).__name__}: {text}".partition("\n")[0]
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is not a whole torch checkpoint of tensors ({reason[:200]}): "
        f"it is truncated, damaged or of another format; download or save it again"
    )


def state_dict_in(loaded: Any, entries: Sequence[str]) -> tuple[str, Mapping[Any, Any]]:
    """The entry of a training checkpoint that holds the weights, and its name: `ema.module`; `""` is all of it.

    Args:
        loaded: What the file holds.
        entries: Names that it may have, the preferred ones first; entries may lie within each other.
    """
    if not isinstance(loaded, Mapping):
        return "", {}
    path: list[str] = []
    for _ in range(_DEPTH):
        entry = next((entry for entry in entries if isinstance(loaded.get(entry), Mapping)), None)
        if entry is None:
            return ".".join(path), loaded
        path.append(entry)
        loaded = loaded[entry]
    return "", {}  # it holds itself


def _both(path: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """By name in the file: the parameter's own without every wrapper, and without the marks of training alone."""
    names = list(names)
    return _peeled(path, names, _WRAPPERS), _peeled(path, names, ())


def _peeled(path: Path, names: Iterable[str], wrappers: Iterable[str]) -> dict[str, str]:
    """By name in the file: the parameter's own, without what training put before it.

    DistributedDataParallel and torch.compile mark what they wrap; other prefixes go where all names have them.
    """
    peeled = {name: name.replace("_orig_mod.", "") for name in names}
    while peeled:
        some = [p for p in wrappers if all(name.startswith(p) for name in peeled.values())]
        some += [p for p in ("module.",) if any(name.startswith(p) for name in peeled.values())]
        if not some:
            break
        peeled = {name: left.removeprefix(some[0]) for name, left in peeled.items()}
    if len(set(peeled.values())) < len(peeled) or "" in peeled.values():
        raise CheckpointError(
            f"{path} holds one parameter under several names, with and without a prefix of a wrapper; "
            f"save the state dict of one model alone"
        )
    return peeled


def _training_metadata(loaded: Any) -> dict[str, str]:
    """How the model was built, where a training script of timm noted it, in the form of our own metadata."""
    noted = libraries.from_training(loaded) if isinstance(loaded, Mapping) else None
    return {"architecture": noted.spec, "model_args": json.dumps(dict(noted.model_args))} if noted else {}
