"""Which tensors of a run are another one's values in other places: rearranged, or cut in pieces and joined again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from revwire.run.pieces import joined, slices_of
from revwire.run.rearrange import is_rearrangement
from revwire.trace.frame import identity

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from revwire.run.pieces import Slice
    from revwire.trace.frame import Identity


class Origins(dict["Identity", "Identity"]):
    """Of a tensor the one that it was made of.

    Attributes:
        joined: Those that were put together from all pieces of another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: set[Identity] = set()
        self._pieces: dict[Identity, tuple[Identity, torch.Size, Slice]] = {}

    def note(
        self, function: Callable[..., Any], args: Any, kwargs: Any, before: Identity | None, result: Any
    ) -> list[Tensor]:
        """Look at a call.

        Args:
            function: What ran.
            args: On what.
            kwargs: The same, by name.
            before: What its first argument was, if that is a tensor.
            result: What came out.

        Returns:
            The tensors that have to stay, so that no other is taken for them.
        """
        if before is not None:
            if (
                isinstance(result, Tensor)
                and result is not args[0]
                and is_rearrangement(function, args, kwargs)
            ):
                self[identity(result)] = before
            elif (cuts := slices_of(function, args[0].shape, args[1:], kwargs)) is not None:
                views = [result] if isinstance(result, Tensor) else list(result)
                for view, where in zip(views, cuts if isinstance(cuts, list) else [cuts], strict=True):
                    self._pieces[identity(view)] = before, args[0].shape, where
                return views
        elif isinstance(result, Tensor):
            self._note_joined(function, args, kwargs, result)
        return [result] if isinstance(result, Tensor) else []

    def _note_joined(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Tensor) -> None:
        parts = args[0] if args else kwargs.get("tensors")
        if not isinstance(parts, list | tuple) or not all(isinstance(part, Tensor) for part in parts):
            return
        pieces = [self._pieces.get(identity(part)) for part in parts]
        known = [piece for piece in pieces if piece is not None]
        if not known or len(known) < len(pieces):
            return
        source, size, _ = known[0]
        if any(piece[0] != source for piece in known):
            return
        if joined(function, args[1:], kwargs, [piece[2] for piece in known], size):
            self[identity(result)] = source
            self.joined.add(identity(result))
