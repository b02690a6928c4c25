"""The conditions a branch ran under, so that running it again in backward is the same run.

What its modules hold (`revwire.run.state`); random state (only where the branch drew numbers; the generators end where
plain training leaves them); autocast, the kernels that attention may choose from, function modes, context variables and
the like. What cannot be put back raises.
"""

from __future__ import annotations

import contextvars
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch

from revwire._torch import GLOBAL_HOOKS, function_modes, swapped_function_modes
from revwire.run.ambient import KERNELS, Float32, as_autocast, autocast_now, kernels, torch_states
from revwire.run.containers import same, swap
from revwire.run.state import ModuleState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from revwire.run.ambient import RandomState
    from revwire.run.sample import Comparison
    from revwire.run.state import Known


class Conditions:
    """What must be put back for a second run. Made by `observe`, used by `run` and `restored`.

    Args:
        modules: The child modules that the branch calls.
        own: Tensors that the branch's code reads itself, as (owner, name).
        device: The device whose random state the branch may draw from, beside the CPU's.
        known: What the modules held last.

    Attributes:
        float32: What products of float32 tensors were computed in.
    """

    __slots__ = (
        "_autocast",
        "_cached",
        "_context",
        "_device",
        "_dtype",
        "_hooks",
        "_kernels",
        "_modes",
        "_random",
        "_state",
        "float32",
    )

    def __init__(
        self,
        modules: Sequence[nn.Module],
        own: Sequence[tuple[nn.Module, str]],
        device: torch.device,
        known: Known | None = None,
    ) -> None:
        self._device = device
        self._context = contextvars.copy_context()
        self._modes = function_modes()
        self._kernels = kernels()
        self._autocast, self._cached = autocast_now(device), torch.is_autocast_cache_enabled()
        self._dtype, self.float32 = torch.get_default_dtype(), Float32.now()
        self._hooks = [dict(hooks) for hooks in GLOBAL_HOOKS] if any(GLOBAL_HOOKS) else None
        self._state = ModuleState(modules, own, known)
        self._random: list[RandomState] = torch_states(device)

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

    def scripts(self) -> AbstractContextManager[None]:
        """What both runs need where there are script modules."""
        return self._state.scripts()

    def compared(self, where: str) -> list[Comparison]:
        """Numbers of what is not copied, of before the forward and of now."""
        return self._state.compared(where)

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
        with ExitStack() as stack:
            self._restore(where, stack)
            return self._context.copy().run(function)

    @contextmanager
    def restored(self, where: str) -> Iterator[None]:
        """The same for the length of a block, but for context variables.

        Raises:
            ReplayError: something cannot be put back.
        """
        with ExitStack() as stack:
            self._restore(where, stack)
            yield

    def _restore(self, where: str, stack: ExitStack) -> None:
        self.check_unchanged(where)
        self._state.put_back(stack)
        if self._hooks is not None or any(GLOBAL_HOOKS):
            for hooks, noted in zip(GLOBAL_HOOKS, self._hooks or repeat({}), strict=False):
                if not same(hooks, noted):
                    swap(hooks, noted, stack)
        for state in self._random:
            stack.enter_context(state.restored())
        if self._autocast != autocast_now(self._device):
            for context in as_autocast(self._autocast):
                stack.enter_context(context)
        _put_back(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, self._cached, stack)
        self._restore_process(stack)
        if self._modes != function_modes():
            stack.enter_context(swapped_function_modes(self._modes))

    def _restore_process(self, stack: ExitStack) -> None:
        """What all threads share."""
        if self._kernels != kernels():
            for (allowed, allow), wanted in zip(KERNELS, self._kernels, strict=True):
                _put_back(allowed, allow, wanted, stack)
        _put_back(torch.get_default_dtype, torch.set_default_dtype, self._dtype, stack)
        if self.float32 != Float32.now():
            self.float32.put_back(stack)


def _put_back(get: Callable[[], Any], put: Callable[[Any], object], wanted: Any, stack: ExitStack) -> None:
    if (now := get()) != wanted:
        put(wanted)
        stack.callback(put, now)


@contextmanager
def observe(
    where: str,
    modules: Sequence[nn.Module],
    own: Sequence[tuple[nn.Module, str]],
    device: torch.device,
    known: Known | None = None,
) -> Iterator[Conditions]:
    """Note the conditions that the block runs a branch under; the arguments are those of `Conditions`.

    Raises:
        ReplayError: the block changed a weight in place.
    """
    conditions = Conditions(modules, own, device, known)
    with conditions.scripts():
        yield conditions
    conditions.settle(where)
