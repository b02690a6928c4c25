"""A trunk that code cuts in pieces and the next block joins again: text and image of a joint transformer.

A piece stands for a slice of both streams and looks like the slice of the merged tensor. Where all of them are joined
as they were cut, the streams come out again and the chain goes on; any other code gets slices of the merged tensor.
Both the finding of chains and their running ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import register_pytree_node
from revwire.pytree import tree_leaves
from revwire.run.rearrange import functions
from revwire.run.travelling import Travelling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_CUTTING = functions("narrow split split_with_sizes chunk tensor_split __getitem__")
_JOINING = functions("cat concat concatenate")


@dataclass(frozen=True)
class Slice:
    """`x.narrow(dim, start, length)`."""

    dim: int
    start: int
    length: int

    def of(self, whole: Tensor) -> Tensor:
        """The slice of a tensor, as a view."""
        return whole.narrow(self.dim, self.start, self.length)


def slices_of(
    function: Any, shape: torch.Size, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Slice | list[Slice] | None:
    """What `function(x, *args, **kwargs)` cuts out of an `x` of a shape.

    Returns:
        A slice where it returns a tensor, those of all tensors where it returns several, None where it does something
        else to `x`.
    """
    if function not in _CUTTING or not _plain(args) or not _plain(kwargs):
        return None
    whole = torch.empty(shape, device="meta")  # a view tells where it begins
    cut = function(whole, *args, **kwargs)
    if isinstance(cut, Tensor):
        return _slice(cut, whole)
    found = [where for view in cut if (where := _slice(view, whole)) is not None]
    return found if len(found) == len(cut) else None


def _plain(arguments: Any) -> bool:
    """Whether there are numbers and slices alone, as masks and indices take single values."""
    leaves = tree_leaves(arguments)
    return all(leaf is Ellipsis or leaf is None or isinstance(leaf, int | slice) for leaf in leaves)


def _slice(view: Tensor, whole: Tensor) -> Slice | None:
    if view._base is not whole or view.ndim != whole.ndim or view.stride() != whole.stride():
        return None  # `x[[0, 1]]` copies
    if 0 in view.shape:
        return None
    shorter = [dim for dim in range(whole.ndim) if view.shape[dim] != whole.shape[dim]]
    if len(shorter) != 1:
        return None
    (dim,) = shorter
    return Slice(dim, int(view.storage_offset() // whole.stride(dim)), view.shape[dim])


def joined(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], pieces: Sequence[Slice], size: torch.Size
) -> bool:
    """Whether `function(parts, *args, **kwargs)` puts the pieces together as they were cut out of a tensor.

    Args:
        function: What is called on them.
        args: What it is called with after them.
        kwargs: The same, by name.
        pieces: What the parts are, in the order in which they are given.
        size: Shape of the tensor that they were cut out of.
    """
    if function not in _JOINING or not pieces:
        return False
    along = args[0] if args else kwargs.get("dim", kwargs.get("axis", 0))
    dim = pieces[0].dim
    if not isinstance(along, int) or along not in (dim, dim - len(size)):
        return False
    at = 0
    for piece in pieces:
        if (piece.dim, piece.start) != (dim, at):
            return False
        at += piece.length
    return at == size[dim]


class Whole(Travelling):
    """What pieces are cut out of: both streams.

    Attributes:
        place: Where they stand; that of a copy too, as some wrappers make of a module's arguments.
    """

    place: Any

    @property
    def left(self) -> bool:
        """Whether the merged tensor was changed, and the streams are history."""
        raise NotImplementedError

    def settled_call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)` on merged tensors."""
        raise NotImplementedError


class Piece(Travelling):
    """A slice of the trunk between two rewired blocks.

    Args:
        whole: What it was cut out of.
        where: Where.
    """

    def __init__(self, whole: Whole, where: Slice) -> None:
        self.whole, self.where, self.dtype = whole, where, whole.dtype
        self.current = where.of(whole.current.detach())

    @property
    def requires_grad(self) -> bool:
        """Whether autograd records what is done with it."""
        return bool(self.whole.requires_grad)

    def tensor(self) -> Tensor:
        """The slice of the merged tensor."""
        return self.where.of(self.whole.tensor())

    def _call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        parts = args[0] if args else kwargs.get("tensors")
        if isinstance(parts, list | tuple) and all(isinstance(part, Piece) for part in parts):
            of_one = all(part.whole.place is self.whole.place and not part.whole.left for part in parts)
            size = self.whole.shape
            if of_one and joined(function, args[1:], kwargs, [part.where for part in parts], size):
                return self.whole
        return self.whole.settled_call(function, args, kwargs)

    def __repr__(self) -> str:
        return f"Piece({tuple(self.shape)} of {self.whole!r})"


def _flatten(piece: Piece) -> tuple[list[Whole], Slice]:
    return [piece.whole], piece.where


def _unflatten(whole: Any, where: Slice) -> Piece:
    return Piece(whole[0], where)


# as FSDP2 finds the tensors of a module's outputs
register_pytree_node(Piece, _flatten, _unflatten, serialized_type_name="revwire.Piece")
