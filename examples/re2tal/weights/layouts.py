"""What a layout is, and how a file of one becomes the tensors of a network, or the other way round.

A layout says of each tensor of ours where it lies in a file (`Origin`). So both ways follow from one function of
names, and what the file has beyond that, or lacks, shows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import torch

from examples.re2tal.errors import Re2TALError
from revwire.printing import first_few

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from examples.re2tal.weights.reading import Stored

_TOLD = 20  # misfits that a message names, of each kind


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours lies in a file.

    Attributes:
        name: The tensor's name. One with {} stands for many, by their number: each is an entry of ours.
        part: (index, of) Ours is one of so many equal parts of the file's, along the first axis.
        shape: Of the file's tensor, where it has dimensions of one that ours has not; -1 for the rest.
        optional: The file may do without it, as the network brings its own.
        computed: The network computes it: the file's has to have the same numbers.
    """

    name: str
    part: tuple[int, int] = (0, 1)
    shape: tuple[int, ...] | None = None
    optional: bool = False
    computed: bool = False


@dataclass(frozen=True)
class Layout:
    """How one project names the tensors of a network.

    Attributes:
        name: Whose layout it is, for people.
        marks: Names that a file of this layout has, after a prefix.
        origin: From the name of a tensor of ours to where it lies, without the prefix.
        prefixes: What may stand before all those names; the longest first.
        others: Beginnings of names, prefix and all, of what a file may hold beside: heads of other tasks.
        rewired: The weights were trained in a rewired network.
        options: What such a file decides about the network, by the tensors of the file.
    """

    name: str
    marks: tuple[str, ...]
    origin: Callable[[str], Origin]
    prefixes: tuple[str, ...] = ("",)
    others: tuple[str, ...] = ()
    rewired: bool = False
    options: Callable[[Mapping[str, Tensor]], dict[str, Any]] = field(default=lambda _: {})


@dataclass(frozen=True)
class Found:
    """A file whose layout is known.

    Attributes:
        stored: The file.
        layout: Its layout.
        prefix: What stands before the names.
    """

    stored: Stored
    layout: Layout
    prefix: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Those that the layout speaks of, without the prefix."""
        everything, others = self.stored.tensors, tuple(self.layout.others)
        return {
            name.removeprefix(self.prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(self.prefix) and not (others and name.startswith(others))
        }

    @cached_property
    def beside(self) -> dict[str, Tensor]:
        """What lies in the file beside those."""
        names = {self.prefix + name for name in self.tensors}
        return {name: tensor for name, tensor in self.stored.tensors.items() if name not in names}

    @property
    def options(self) -> dict[str, Any]:
        """What the file decides about the network that it is loaded into."""
        return self.layout.options(self.tensors)

    def get(self, name: str) -> Tensor | None:
        """A tensor by the name that it has in our network; None if the file lacks it."""
        return _taken(self.layout.origin(name), self.tensors)


def find(stored: Stored, layouts: Sequence[Layout]) -> Found | None:
    """The layout that a file is of, None if it is of none of these."""
    names = stored.tensors.keys()
    for layout in layouts:
        for prefix in layout.prefixes:
            if all(prefix + mark in names for mark in layout.marks):
                return Found(stored, layout, prefix)
    return None


def fitted(found: Found, wanted: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a network, by its own names, taken from a file.

    Args:
        found: The file.
        wanted: What the network has at present; may lie on the meta device.
        what: The network, for the error.

    Raises:
        Re2TALError: a tensor is missing, of another shape, or left over; the message names them with their shapes.
    """
    tensors, used = found.tensors, set[str]()
    fits: dict[str, Tensor] = {}
    misfits: dict[str, list[str]] = defaultdict(list)
    for name, ours in wanted.items():
        origin = found.layout.origin(name)
        used.update(_names(origin, tensors))
        theirs, label = _taken(origin, tensors), found.prefix + origin.name
        if theirs is None:
            if not origin.optional:
                misfits["missing"].append(f"{label} ({_shape(ours)})")
        elif theirs.shape != _stored_shape(origin, ours):
            misfits["of another shape"].append(f"{label} ({_shape(theirs)}, not {_shape(ours)})")
        elif origin.computed and not _same(theirs.reshape(ours.shape), ours):
            misfits["of other numbers than the network computes"].append(f"{label} ({_shape(ours)})")
        else:
            fits[name] = theirs.reshape(ours.shape)
    known = {found.prefix + name for name in used}
    misfits["left over"] = [
        f"{name} ({_shape(tensor)})"
        for name, tensor in found.stored.tensors.items()
        if name not in known and not name.startswith(tuple(found.layout.others))
    ]
    if told := "; ".join(f"{kind}: {first_few(names, _TOLD)}" for kind, names in misfits.items() if names):
        raise Re2TALError(
            f"{found.stored.path} ({found.layout.name}) does not fit {what}; {told}; python -m examples.re2tal.convert "
            "says which backbone a file is of"
        )
    return fits


def load(module: nn.Module, found: Found, what: str) -> None:
    """Take the weights of a file, all of them and no others.

    Raises:
        Re2TALError: they do not fit; the message names what is missing, left over or of another shape.
    """
    wanted = tensors_of(module)
    with torch.no_grad():
        for name, tensor in fitted(found, wanted, what).items():
            wanted[name].copy_(tensor)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def written(found: Found, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under the names, and in the shapes, that a file of that layout has: the way back."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, ours in tensors.items():
        origin = found.layout.origin(name)
        many = "{}" in origin.name
        for i, one in enumerate(ours if many else [ours]):
            at = found.prefix + origin.name.format(i)
            parts[at][origin.part[0]] = one.reshape(origin.shape) if origin.shape else one
    return {
        name: torch.cat([by[i] for i in sorted(by)]) if len(by) > 1 else by[min(by)]
        for name, by in parts.items()
    }


def _names(origin: Origin, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the file of what a tensor of ours is made of; none if the file lacks it."""
    names = (origin.name.format(i) for i in count()) if "{}" in origin.name else iter([origin.name])
    return list(takewhile(tensors.__contains__, names))


def _taken(origin: Origin, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor as it lies there, in the file's own shape."""
    names = _names(origin, tensors)
    if not names:
        return None
    theirs = torch.stack([tensors[name] for name in names]) if "{}" in origin.name else tensors[names[0]]
    index, of = origin.part
    return theirs if theirs.ndim == 0 or theirs.shape[0] % of else theirs.chunk(of)[index]


def _stored_shape(origin: Origin, ours: Tensor) -> torch.Size:
    return (
        ours.shape
        if origin.shape is None
        else torch.empty(ours.shape, device="meta").reshape(origin.shape).shape
    )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """The same numbers, as far as the file's precision tells."""
    bits = torch.finfo(theirs.dtype).bits if theirs.is_floating_point() else 64
    return ours.is_meta or torch.allclose(
        theirs.double(), ours.double(), rtol=0, atol=1e-5 if bits >= 32 else 1e-2
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def listed(tensors: Mapping[str, Tensor]) -> str:
    """The first of them, by name and shape."""
    return first_few([f"{name} ({_shape(tensor)})" for name, tensor in tensors.items()], _TOLD)
