"""Looking on while the steps of a rewired model run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from revwire.run.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from revwire.run.branch import Branch
    from revwire.run.tape import Tape


@contextmanager
def around_steps(around: Callable[[Callable[[], Streams], Streams, Branch], Streams]) -> Iterator[None]:
    """For the length of the block, each step of a chain runs as `around(step, streams, branch)`, which calls `step`."""
    advance = Streams.advance

    def watched(streams: Streams, branch: Branch, *args: Any, **kwargs: Any) -> Streams:
        return around(lambda: advance(streams, branch, *args, **kwargs), streams, branch)

    Streams.advance = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Streams.advance = advance  # type: ignore[method-assign]


class Growth:
    """How much larger than a state of a chain those are that it is reconstructed from, in a run that was looked on at.

    `x[i-1]` comes out of `x[i+1]` rounded as finely as that is, and so do all before it. Where a trunk grows from small
    embeddings to large sums, float32 leaves fewer digits of the small ones.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[Tape, list[float]]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notes the sizes of all states of all chains that run in the block."""

        def note(step: Callable[[], Streams], streams: Streams, *_: object) -> Streams:
            following = step()
            assert following.link is not None
            tape = following.link.tape
            sizes = self._sizes.setdefault(id(tape), (tape, [_size(streams.current)]))[1]
            sizes.append(_size(following.current))
            return following

        with around_steps(note):
            yield

    @property
    def factor(self) -> float:
        """The most roundings, in units of its own last digit, that reconstructing leaves in a state."""
        every = (sizes for _, sizes in self._sizes.values())
        return max(
            (sum(sizes[i:]) / size for sizes in every for i, size in enumerate(sizes) if size > 0),
            default=0.0,
        )


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
