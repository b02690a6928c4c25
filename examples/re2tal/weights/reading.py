"""Weights from a file: safetensors, or a torch file of tensors and plain values, of which nothing is run."""

from __future__ import annotations

import argparse
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from examples.re2tal.errors import Re2TALError
from revwire.checkpoint.disk import check_regular
from revwire.checkpoint.limits import check_stored, check_unpacked, is_dense
from revwire.checkpoint.reader import state_dict_in
from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUFFIXES = (".safetensors", ".pth", ".pt", ".pyth", ".tar", ".ckpt", ".bin")
"""How names of files of weights end."""

# where training scripts put the weights, averaged ones first: those are what gets evaluated
_ENTRIES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state", "model", "module")
# what DistributedDataParallel and torch.compile put before the names of what they wrap
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")


class _LogBuffer:
    """Stands for what mmengine logs beside the weights; it takes whatever is in the file, and nobody looks at it."""


def _nothing(*_: object) -> None:
    """Stands for the functions that mmengine's log buffers name; none of them is called."""


DATA: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *[type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"],
    *[
        (data.__reduce__()[0], f"{module}.multiarray.{name}")
        for name, data in (("_reconstruct", np.empty(0)), ("scalar", np.float64(0)))
        for module in ("numpy.core", "numpy._core")
    ],
    (_LogBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_nothing, "builtins.getattr"),  # how a pickle names methods of that buffer
]
"""What files of weights pickle beside tensors, all of it data: settings of the command line (VideoMAE), numpy's numbers
and what mmengine logs. By the names in the file: mmengine need not be there, and numpy 1 and 2 differ in theirs."""


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        path: The file.
        tensors: By name, without what wrappers of the training put before it.
        entry: Which entry of a torch file they were under (`state_dict_ema`); "" if they are the whole file.
        metadata: Of a safetensors file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    entry: str
    metadata: Mapping[str, str]


def read(path: Path) -> Stored:
    """Open a file of weights; tensors are mapped, not read, where the format allows that.

    Raises:
        Re2TALError: there is none, it is damaged, would be many times larger once it is opened, or holds objects whose
            unpickling could run code.
    """
    try:
        return _read(path)
    except CheckpointError as error:
        raise Re2TALError(str(error)) from None


def _read(path: Path) -> Stored:
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise Re2TALError(f"{path}: {error.strerror or error}") from None
    if head[8:] == b"{":  # after the length of the header
        tensors, metadata = _safetensors(path)
        return Stored(path, _unwrapped(path, tensors), "", metadata)
    entry, state = state_dict_in(_torch(path, mmap=head.startswith(b"PK")), _ENTRIES)
    others = [name for name, value in state.items() if not is_dense(value)]
    if others or not state:
        what = (
            f"{others[0]!r} is a {type(state[others[0]]).__name__}, no tensor"
            if others
            else "there are no tensors"
        )
        raise Re2TALError(
            f"{path} has its weights under none of {', '.join(_ENTRIES)}, and is no state dict itself ({what}); save "
            "the weights alone: torch.save(model.state_dict(), file)"
        )
    check_stored(path, state)
    return Stored(path, _unwrapped(path, {name: value.detach() for name, value in state.items()}), entry, {})


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise Re2TALError(
            f"{path} is no whole safetensors file ({error}); download or save it again"
        ) from None


def _torch(path: Path, *, mmap: bool) -> Any:
    if mmap:
        check_unpacked(path)
    try:
        with torch.serialization.safe_globals(DATA), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001  # a damaged pickle can make the restricted unpickler raise anything
        kind, text = type(error).__name__, str(error)
    if found := re.search(r"unsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", text, re.IGNORECASE):
        raise Re2TALError(
            f"{path} pickles {found[1]} beside its weights, and reading that could run code, so it is not read; "
            "where it comes from a source that you trust, save the weights alone there: "
            "torch.save(torch.load(file, weights_only=False)['state_dict'], other)"
        )
    inner = re.search(r"WeightsUnpickler error: (.*)", text)
    reason = inner[1] if inner else f"{kind}: {text}".partition("\n")[0]
    raise Re2TALError(f"{path} is no whole file of weights ({reason[:200]}); download or save it again")


def _unwrapped(path: Path, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    names = {name: _WRAPPERS.sub("", str(name)) for name in tensors}
    if len(set(names.values())) < len(names):
        raise Re2TALError(f"{path} holds weights of several models; save those of one alone")
    return {names[name]: tensor for name, tensor in tensors.items()}
