"""A meter of an estimated step: what is alive at the peak, and which module was running then."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from revwire.measure.live_bytes import LiveBytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer would be given."""
    return [p for p in model.parameters() if p.requires_grad]


class Meter(LiveBytes):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Live bytes, and where they are made; from `begin` on, the peak's place too."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self.alive: Counter[str] = Counter()
        self.where = ""
        self.path: list[str] = []
        self._last = ""
        self._phase = "model"
        self._labels: dict[int, str] = {}
        self._parameters: list[nn.Parameter] = []
        self._gradients = 0
        self._base: int | None = None
        self._state = 0
        self._shown = 0

    def watch(self, model: nn.Module) -> None:
        """Tell gradients from temporaries: those of this model's parameters, where they are not there already."""
        self._parameters = trainable(model)
        arriving = [p for p in self._parameters if p.grad is None]

        def arrived(parameter: Tensor) -> None:
            self._gradients += parameter.nbytes

        for parameter in arriving:
            parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def begin(self, optimizer_state: int) -> None:
        """From here on the peak is looked for; what is alive now, and the optimizer's state, is no activation."""
        self._state = optimizer_state
        self._live += optimizer_state
        self._base, self._gradients = self.live, 0
        self.reset_peak()

    def passing(self, nbytes: int) -> None:
        """Count what comes and goes and was measured elsewhere."""
        if (moment := self.live + nbytes) > self.peak:
            self.peak, self.where, self.alive = moment, self._place(), self._told()
            self.alive[self._phase] += nbytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made in the block is called after `name`, where no module makes it."""
        self._phase, self._last, before = name, "", self._phase
        yield
        self._phase = before

    def entered(self, path: str) -> None:
        """A module begins to run."""
        self.path.append(path)
        self._last = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.peak
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._base is None:
            return out
        self.activations = max(self.activations, self._live - self._base - self._gradients)
        if self.peak > before:
            self.where = self._place()
            # telling all that is alive takes time: only for peaks that are really others
            if self.peak > 1.01 * self._shown:
                self._shown = self.peak
                self.alive = self._told()
        return out

    def _place(self) -> str:
        if self.path:
            return f"{self._phase} of {self.path[-1]}"
        return (
            f"{self._phase}, after {self._last} ran again"
            if self._last and self._phase == "backward"
            else self._phase
        )

    def _count(self, storage: torch.UntypedStorage) -> None:
        super()._count(storage)
        if self.path:
            self._labels[id(storage)] = re.sub(r"\b\d+\b", "*", self.path[-1])
        else:
            self._labels[id(storage)] = self._phase

    def _told(self) -> Counter[str]:
        gradients = {id(p.grad.untyped_storage()) for p in self._parameters if p.grad is not None}
        told = Counter({"optimizer state": self._state} if self._state else {})
        for key, counted in self._counted.items():
            told["gradients" if key in gradients else self._labels[key]] += counted.nbytes
        return told


@contextmanager
def paths_known(meter: Meter, model: nn.Module) -> Iterator[None]:
    """The meter knows which module runs."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            meter.entered(names[id(module)] or "(model)")

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            meter.path.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        # a second run that stops early leaves its modules by an exception
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield
