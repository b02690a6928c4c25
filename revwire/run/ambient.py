"""What a branch depends on beside its modules and its arguments: random numbers, autocast, the kernels allowed."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.backends import cuda as sdp

from revwire._torch import only_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (sdp.flash_sdp_enabled, sdp.enable_flash_sdp),
    (sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp),
    (sdp.math_sdp_enabled, sdp.enable_math_sdp),
    (sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp),
)


@contextmanager
def no_weight_cache() -> Iterator[None]:
    """For the length of the block, autocast does not hold on to the weights that it casts.

    It would until the end of the forward: a copy of all weights, for steps that keep nothing else.
    """
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


@dataclass(slots=True)
class RandomState:
    """One generator's state, with the functions that read and write it."""

    get: Callable[[], Any]
    put: Callable[[Any], object]
    state: Any

    @classmethod
    def now(cls, get: Callable[[], Any], put: Callable[[Any], object]) -> RandomState:
        """The state as it is."""
        return cls(get, put, get())

    def moved(self) -> bool:
        """Whether numbers were drawn since."""
        now = self.get()
        return not torch.equal(now, self.state) if isinstance(now, Tensor) else bool(now != self.state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The block draws the same numbers again; afterwards the generator is where it was before the block."""
        now = self.get()
        self.put(self.state)
        try:
            yield
        finally:
            self.put(now)


def generators(device: torch.device) -> Iterator[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How to read and write the state of each generator that a branch may draw from; none on fake tensors."""
    if only_shapes():
        return
    yield torch.get_rng_state, torch.set_rng_state
    yield random.getstate, random.setstate
    if device.type not in {"cpu", "meta"}:
        module: Any = torch.get_device_module(device)
        yield (lambda: module.get_rng_state(device)), (lambda state: module.set_rng_state(state, device))


def autocast_now(device: torch.device) -> list[dict[str, Any]]:
    """The arguments of the `torch.autocast` that would put autocast as it is now, for each kind of device concerned."""
    kinds = dict.fromkeys(("cpu", device.type)) if device.type != "meta" else ("cpu",)
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in kinds
    ]
