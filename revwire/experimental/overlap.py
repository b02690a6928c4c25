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

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import FakeTensor, backward_pass, only_shapes
from revwire.errors import ReplayError
from revwire.run.recurrence import Weights
from revwire.run.tape import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.run.branch import Branch, BranchRun
    from revwire.run.sample import Comparison
    from revwire.run.tape import Pass, Tape

EXPERIMENTAL = (
    "overlap=True is experimental: its numbers are tested, but no GPU has shown yet that it pays, and an H200 took "
    "longer; measure a step with and without it"
)

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
        compared: Numbers of both runs: looked at only where somebody asks for what it saved.
    """

    def __init__(self, device: torch.device, held: tuple[Tensor, ...]) -> None:
        self._done: Any = None
        self.saved: dict[int, Tensor] = {}
        self.compared: list[Comparison] = []
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


class OverlappedLink(Link):
    """A step whose second run may start while the gradients of the step after it are computed."""

    def __init__(self, tape: Tape, position: int, branch: Branch, *, bottom: bool) -> None:
        super().__init__(tape, position, branch, bottom=bottom)
        self._ahead: weakref.WeakKeyDictionary[Pass, Ahead] = weakref.WeakKeyDictionary()

    def run_again(self, now: Pass, run: int) -> dict[int, Tensor]:
        """What the run ahead saved, if there was one; then the step before starts its own."""
        ahead = self._join(now)
        if ahead is None:
            saved = super().run_again(now, run)
        else:
            saved = ahead.saved
            now.compared += ahead.compared
        self._ahead.pop(now, None)
        below = None if self.before is None else self.before()
        if isinstance(below, OverlappedLink) and backward_pass() != -1:
            below.start_ahead(now)
        return saved

    def take(self, now: Pass, *, last: bool) -> tuple[Tensor, Tensor | None]:
        """As any link, after what the step after this one makes ahead is there."""
        if isinstance(self.next, OverlappedLink):
            self.next._join(now)  # noqa: SLF001 - of this class
        return super().take(now, last=last)

    def start_ahead(self, now: Pass) -> None:
        """Run the branch again before a ticket asks for it: beside the gradients of the step after this one."""
        assert self.next is not None
        pair = now.pairs.get(self.next.position)
        whole = self.branch.slices is None and len(self.runs) == 1 and not self.runs[0].silent
        # an exact step takes what it is reconstructed from out of a store of its own; parameters of another class than
        # torch's (sharded ones) may do more than compute when they are used
        if pair is None or not whole or not isinstance(self.inverse, Weights):
            return
        if not _plain_parameters(self.runs[0]):
            return
        if (self.position, 0) in now.saved or self.position in now.opened:
            return
        asked = len(now.compared)
        ahead = Ahead(pair[0].device, pair if self._reconstructs else pair[:1])
        try:
            with ahead.running():
                ahead.saved = super().run_again(now, 0)
        except ReplayError:
            # raised again when a ticket asks, if this backward asks for this step at all
            return
        ahead.compared = now.compared[asked:]
        del now.compared[asked:]
        self._ahead[now] = ahead

    def _join(self, now: Pass) -> Ahead | None:
        """Wait for the branch's run ahead, if there is one."""
        if (ahead := self._ahead.get(now)) is not None:
            ahead.join()
            # a weight may have been updated meanwhile (an optimizer in a hook of its gradient)
            self.runs[0].check_unchanged()
        return ahead


def _plain_parameters(run: BranchRun) -> bool:
    """Whether the parameters of a branch are tensors of torch's own class."""
    assert run.conditions is not None
    kinds = {Tensor, nn.Parameter, FakeTensor}
    return all(type(tensor) in kinds for tensor in run.conditions.parameters)
