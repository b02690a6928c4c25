"""The conditions a branch ran under, so that running it again in backward is the same run.

What its modules hold (`revwire.run.state`); random state (only where the branch drew numbers; the generators end where
plain training leaves them); autocast, the kernels that attention may choose from, function modes, context variables and
the like. What cannot be put back raises.
"""

from __future__ import annotations

import contextvars
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from revwire._torch import GLOBAL_HOOKS, function_modes, swapped_function_modes
from revwire.run.ambient import KERNELS, autocast_now, generators
from revwire.run.containers import same, swap
from revwire.run.state import ModuleState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from revwire.run.ambient import RandomState


class Conditions:
    """What must be put back for a second run. Made by `observe`, used by `run` and `restored`.

    Args:
        modules: The child modules that the branch calls.
        own: Tensors that the branch's code reads itself, as (owner, name).
        device: The device whose random state the branch may draw from, beside the CPU's.
    """

    __slots__ = (
        "_ambient",
        "_autocast",
        "_context",
        "_device",
        "_hooks",
        "_kernels",
        "_modes",
        "_random",
        "_state",
    )

    def __init__(
        self, modules: Sequence[nn.Module], own: Iterable[tuple[nn.Module, str]], device: torch.device
    ) -> None:
        self._device = device
        self._context = contextvars.copy_context()
        self._modes = function_modes()
        self._kernels = tuple(allowed() for allowed, _ in KERNELS)
        self._autocast: list[dict[str, Any]] = autocast_now(device)
        self._ambient = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        self._hooks = [(hooks, dict(hooks)) for hooks in GLOBAL_HOOKS if hooks]
        self._state = ModuleState(modules, own)
        self._random: list[RandomState] = generators(device, self._state.modules)

    def settle(self, where: str) -> None:
        """See what the branch's forward, which is over, has moved.

        Raises:
            ReplayError: it changed a weight in place.
        """
        self._random = [state for state in self._random if state.moved()]
        self._state.settle(where)
        self._random += self._state.generators

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the modules."""
        return self._state.parameters

    def check_unchanged(self, where: str) -> None:
        """See to it that weights and buffers are as the forward found them.

        Raises:
            ReplayError: one was changed in place since, or freed.
        """
        self._state.check(where)

    def run(self, where: str, function: Callable[[], Any]) -> Any:
        """What a function returns that runs under the forward's conditions; everything else is left as it was.

        Raises:
            ReplayError: something cannot be put back.
        """
        with self.restored(where):
            return self._context.copy().run(function)

    @contextmanager
    def restored(self, where: str) -> Iterator[None]:
        """The same for the length of a block, but for context variables.

        Raises:
            ReplayError: something cannot be put back.
        """
        self.check_unchanged(where)
        with ExitStack() as stack:
            self._state.put_back(stack)
            for hooks in GLOBAL_HOOKS:
                content = next((noted for known, noted in self._hooks if known is hooks), {})
                if (hooks or content) and not same(hooks, content):
                    swap(hooks, content, stack)
            for state in self._random:
                stack.enter_context(state.restored())
            if self._autocast != autocast_now(self._device):
                for arguments in self._autocast:
                    stack.enter_context(torch.autocast(**arguments))
            for (allowed, allow), wanted in zip(KERNELS, self._kernels, strict=True):
                if (now := allowed()) is not wanted:
                    allow(wanted)
                    stack.callback(allow, now)
            self._put_back_ambient(stack)
            if self._modes != function_modes():
                stack.enter_context(swapped_function_modes(self._modes))
            yield

    def _put_back_ambient(self, stack: ExitStack) -> None:
        dtype, precision = self._ambient
        if (now := torch.get_default_dtype()) is not dtype:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, now)
        if (then := torch.get_float32_matmul_precision()) != precision:
            torch.set_float32_matmul_precision(precision)
            stack.callback(torch.set_float32_matmul_precision, then)


@contextmanager
def observe(
    where: str, modules: Sequence[nn.Module], own: Iterable[tuple[nn.Module, str]], device: torch.device
) -> Iterator[Conditions]:
    """Note the conditions that the block runs a branch under; the arguments are those of `Conditions`.

    Raises:
        ReplayError: the block changed a weight in place.
    """
    conditions = Conditions(modules, own, device)
    yield conditions
    conditions.settle(where)
