"""Tensors of safetensors files; each read opens its file anew, so that what was read does not stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_STAYS = 64 * 2**20  # bytes read before a file is opened again; its pages stay in memory until then


class Mapped(Mapping[str, Tensor]):
    """Tensors by name, each mapped from its file when it is asked for.

    A mapped file's pages count as memory once they were looked at, and go when the last tensor of that opening does.

    Args:
        places: By name: the file a tensor is in, and its name there.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = dict(places)
        self._open: safe_open | None = None
        self._path: Path | None = None
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        path, inside = self._places[name]
        if self._open is None or path != self._path or self._read > _STAYS:
            self._open, self._read = None, 0
        try:
            if self._open is None:
                self._open, self._path = safe_open(path, framework="pt", device="cpu"), path
            tensor: Tensor = self._open.get_tensor(inside)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:  # reading it a first time found nothing wrong
            raise CheckpointError(f"{path} changed while it was read ({error}): start again") from error
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places
