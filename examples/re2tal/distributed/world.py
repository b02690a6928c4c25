"""This process among those that torchrun started: by nccl on GPUs, by gloo on CPUs; alone without torchrun."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: What it computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """This process's items: every `size`-th, none twice and none added to make shares equal."""
        return list(items[self.rank :: self.size])

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def agree(self, tensors: Sequence[Tensor]) -> None:
        """All processes take over the first one's values, as of statistics that each has counted in its own batches."""
        if self.size == 1 or not tensors:
            return
        # at once, and in a type that holds counts and statistics exactly
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        distributed.broadcast(flat, 0)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """This process's place among those that torchrun started with it; alone without torchrun.

    Args:
        device: `"auto"`: a GPU where there is one.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    )
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank, size, place)
    finally:
        distributed.destroy_process_group()
