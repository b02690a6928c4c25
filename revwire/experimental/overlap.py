"""Backward's two kinds of work side by side: the next step's second run beside the gradients of this one.

They do not need each other: as soon as a step has reconstructed the input of the step before, that one's branch can run
again, while the device computes the gradients of this one. The idea is PaReprop's (Zhu and Mangalam, 2023, arXiv
2306.09342, section 3). It pays where one kernel does not fill the device, and takes the insides of one branch more.

The second run goes to a stream of its own (`side`), the gradients stay on the one autograd runs (`main`). Three rules
keep them apart, and tests/experimental/test_overlap.py checks that no two kernels meet without them:

1. What runs ahead starts when everything issued on `main` so far is done: it reads what `main` made, and takes the
   memory of what `main` has let go.
2. Nobody on another stream touches what ran ahead before it is joined.
3. What it reads of the memory of `main` is held until then. The allocator gives a freed block to the next kernel of its
   stream, whatever other streams still do with it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from revwire._torch import only_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_SIDES: dict[tuple[torch.device, Any], Any] = {}


def can_overlap(device: torch.device) -> bool:
    """Whether a device runs several streams at a time; fake tensors always do, for an estimate to count them."""
    return device.type not in {"cpu", "meta", "mps"} or only_shapes()


def device_module(device: torch.device) -> Any:
    """`torch.cuda`, `torch.xpu`, ...: where streams are; on a CPU they do nothing."""
    return torch.cpu if device.type in {"cpu", "meta"} else torch.get_device_module(device)


def new_stream(module: Any, device: torch.device) -> Any:
    """Another stream of a device."""
    return module.Stream() if module is torch.cpu else module.Stream(device=device)


class Ahead:
    """A second run that was started before anybody asked for it.

    Attributes:
        saved: What it saved for the tickets of its branch.
    """

    def __init__(self, device: torch.device, held: tuple[Tensor, ...]) -> None:
        self._done: Any = None
        self.saved: dict[int, Tensor] = {}
        self._device, self._held = device, held
        self._module = device_module(device)
        self._main = self._module.current_stream(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the block issues runs on the side."""
        # one for each main stream: what comes back to a side's pool, only its own main has seen the last of
        pair = self._device, self._main
        if pair not in _SIDES:
            _SIDES[pair] = new_stream(self._module, self._device)
        side = _SIDES[pair]
        side.wait_stream(self._main)
        with self._module.stream(side):
            try:
                yield
            finally:
                self._done = side.record_event()

    def join(self) -> None:
        """Have the stream of now, and the one that this ran beside, wait until it is done."""
        for stream in (self._main, self._module.current_stream(self._device)):
            stream.wait_event(self._done)

    def __del__(self) -> None:
        # nobody asked for it, or an error ended the backward: its memory must not be given away while it runs
        if self._done is not None:
            self._main.wait_event(self._done)
