"""Fingerprints of tensor names and shapes, and the indexes of those of timm's and torchvision's architectures.

A fingerprint is a sum of hashes, one for each tensor's name and shape. So tensors whose shapes depend on the number of
classes, the input size or the channels can be left out of it again by subtracting their hashes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from revwire.libraries.comparison import Shapes

_BITS = 2**64 - 1


@dataclass(frozen=True)
class Index:
    """What the package knows of a library's architectures.

    Attributes:
        library: The library.
        version: The version of it that the index was made with.
        flexible: Sets of patterns of the tensors that may have other shapes, or not be there.
        architectures: By name: fingerprint without flexible tensors, the same of names alone, which set is flexible.
    """

    library: str
    version: str
    flexible: Sequence[frozenset[str]]
    architectures: Mapping[str, tuple[int, int, int]]

    def with_shapes(self, shapes: Shapes) -> list[str]:
        """The architectures whose tensors have these names and shapes, but for flexible ones."""
        sums = _Sums(shapes.items())
        found = [sums.without(patterns) for patterns in self.flexible]
        return [name for name, (own, _, kind) in self.architectures.items() if found[kind] == own]

    def with_names(self, shapes: Shapes) -> list[str]:
        """The architectures whose tensors have these names, but for flexible ones."""
        sums = _Sums((name, ()) for name in shapes)
        found = [sums.without(patterns) for patterns in self.flexible]
        return [name for name, (_, own, kind) in self.architectures.items() if found[kind] == own]


def index_name(library: str) -> str:
    """The file in this package that has the index of a library."""
    return f"{library}_index.json.gz"


@cache
def index(library: str) -> Index:
    """The index of a library that lies in the package."""
    data = json.loads(gzip.decompress(files(__package__).joinpath(index_name(library)).read_bytes()))
    architectures = {
        name: (int(shapes, 16), int(names, 16), kind)
        for name, (shapes, names, kind) in data["architectures"].items()
    }
    return Index(
        library, data["version"], [frozenset(patterns) for patterns in data["flexible"]], architectures
    )


def packed(version: str, found: Mapping[str, tuple[Shapes, Iterable[str]]]) -> bytes:
    """An index as it lies in the package.

    Args:
        version: Of the library.
        found: By architecture: names and shapes, and those among the names that are flexible.

    Returns:
        The same bytes for the same content.
    """
    sets: dict[tuple[str, ...], int] = {}
    architectures: dict[str, Any] = {}
    for name, (shapes, flexible) in sorted(found.items()):
        patterns = tuple(sorted({pattern(tensor) for tensor in flexible}))
        kind = sets.setdefault(patterns, len(sets))
        of_shapes = _Sums(shapes.items()).without(patterns)
        of_names = _Sums((tensor, ()) for tensor in shapes).without(patterns)
        architectures[name] = [f"{of_shapes:x}", f"{of_names:x}", kind]
    data = {"version": version, "flexible": list(sets), "architectures": architectures}
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)


def pattern(name: str) -> str:
    """A name without its block numbers: what is flexible in one block is in all."""
    return re.sub(r"\d+", "#", name)


class _Sums:
    """Hashes of names and shapes, added up by pattern."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        self._by_pattern: dict[str, int] = defaultdict(int)
        for name, shape in tensors:
            if name.endswith("num_batches_tracked"):  # which old checkpoints lack
                continue
            digest = blake2b(f"{name} {'x'.join(map(str, shape))}".encode(), digest_size=8).digest()
            self._by_pattern[pattern(name)] += int.from_bytes(digest, "little")
        self._all = sum(self._by_pattern.values())

    def without(self, patterns: Iterable[str]) -> int:
        return (self._all - sum(self._by_pattern.get(each, 0) for each in patterns)) & _BITS
