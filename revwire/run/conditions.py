"""The conditions a branch ran under, so that running it again in backward is the same run.

Noted in forward and put back for the second run: random state (only where the branch drew numbers; the generators end
where plain training leaves them), autocast, train or eval mode, plain values that modules replaced. The second run has
the very weights and buffers of the forward, and raises if they were changed in place; BatchNorm statistics move once,
in the forward.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import AnyTrackingNorm
from revwire.errors import ReplayError
from revwire.run.ambient import KERNELS, RandomState, autocast_now, generators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_MISSING = object()

_PLAIN = (Tensor, bool, int, float, str, type(None))
"""Types of attributes that are followed when a module replaces them in its forward."""


@dataclass(slots=True)
class Held:
    """A module's tensor as a branch's forward found it."""

    module: nn.Module
    key: str
    tensor: Tensor
    version: int
    requires_grad: bool

    def again(self) -> Tensor:
        """The tensor as it was, also if it was frozen or thawed since."""
        if self.tensor.requires_grad is self.requires_grad:
            return self.tensor
        other = self.tensor.detach().requires_grad_(self.requires_grad)
        return nn.Parameter(other, self.requires_grad) if isinstance(self.tensor, nn.Parameter) else other


@dataclass(slots=True)
class Conditions:
    """What must be put back for a second run. Made by `observe`, used by `restored`.

    Attributes:
        parameters: The weights of the forward; another version of one at the second run is an error.
        modes: Whether each module was in train mode.
        attributes: Values that modules replaced in the forward (a counter, a schedule, an entry of a cache), as they
            were before: where they are held, their name, the value.
        buffers: Buffers the forward left alone, held to the same rule.
        loans: Buffers to stand in during the second run, as they were before the first.
        scratch: BatchNorms in training: their second run updates copies.
        random: The random states before the branch, of those it moved.
        autocast: Autocast contexts to enter.
        kernels: Which kernels attention may choose from (`torch.nn.attention.sdpa_kernel`).
    """

    parameters: list[Held]
    modes: list[tuple[nn.Module, bool]] = field(default_factory=list)
    attributes: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    buffers: list[Held] = field(default_factory=list)
    loans: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    scratch: list[nn.Module] = field(default_factory=list)
    random: list[RandomState] = field(default_factory=list)
    autocast: list[dict[str, Any]] = field(default_factory=list)
    kernels: tuple[bool, ...] = ()

    @contextmanager
    def restored(self, where: str) -> Iterator[None]:
        """Run the block under the forward's conditions, and leave everything else as it was.

        Raises:
            ReplayError: a weight or buffer was changed in place since the forward, or freed.
        """
        self.check_unchanged(where)
        with ExitStack() as stack:
            for owner, key, value in self._loans():
                stack.enter_context(_lent(owner, key, value))
            for state in self.random:
                stack.enter_context(state.restored())
            for arguments in self.autocast:
                stack.enter_context(torch.autocast(**arguments))
            for (allowed, allow), wanted in zip(KERNELS, self.kernels, strict=True):
                if (now := allowed()) is not wanted:
                    allow(wanted)
                    stack.callback(allow, now)
            yield

    def check_unchanged(self, where: str) -> None:
        """See to it that weights and buffers are as the forward found them.

        Raises:
            ReplayError: one was changed in place since, or freed.
        """
        for held in (*self.parameters, *self.buffers):
            _check(held, where)

    def _loans(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """What differs from the forward, as (where it is held, its name, what it was)."""
        for held in self.parameters:
            if held.module._parameters.get(held.key) is not (tensor := held.again()):
                yield held.module._parameters, held.key, tensor
        for module, training in self.modes:
            if module.training is not training:
                yield module.__dict__, "training", training
        yield from self.attributes
        yield from self._lent_buffers()

    def _lent_buffers(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        for held in self.buffers:
            tensor = held.again()
            if held.module.training and tensor.is_floating_point():
                # F.batch_norm moves statistics without a word to their version, in modules of any class
                yield (
                    held.module._buffers,
                    held.key,
                    tensor.detach().clone().requires_grad_(tensor.requires_grad),
                )
            elif held.module._buffers.get(held.key) is not tensor:
                yield held.module._buffers, held.key, tensor
        for module, key, tensor in self.loans:
            yield module._buffers, key, tensor.clone()
        for module in self.scratch:
            for key, buffer in list(module._buffers.items()):
                if buffer is not None:
                    yield module._buffers, key, buffer.clone()


@contextmanager
def observe(
    modules: Sequence[nn.Module], own: Sequence[tuple[nn.Module, str]], device: torch.device
) -> Iterator[Conditions]:
    """Note the conditions that the block runs a branch under.

    Args:
        modules: The child modules that the branch calls.
        own: Parameters and buffers that the branch's code reads itself, as (owner, name).
        device: The device whose random state the branch may draw from, beside the CPU's.
    """
    kernels = tuple(allowed() for allowed, _ in KERNELS)
    conditions = Conditions(parameters=[], autocast=autocast_now(device), kernels=kernels)
    before: list[tuple[Held, Tensor]] = []
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in (m for top in modules for m in top.modules()):
        conditions.modes.append((module, module.training))
        attributes.append((module.__dict__, module.__dict__.copy()))
        caches = (held for key, held in module.__dict__.items() if type(held) is dict and key[0] != "_")
        attributes.extend((cache, cache.copy()) for cache in caches)
        conditions.parameters.extend(
            _held(module, k, p) for k, p in module._parameters.items() if p is not None
        )
        if module._buffers and isinstance(module, AnyTrackingNorm) and module.training:
            conditions.scratch.append(module)
        elif module._buffers:
            before.extend(_copied(module, module._buffers))
    for module, key in own:
        if (parameter := module._parameters.get(key)) is not None:
            conditions.parameters.append(_held(module, key, parameter))
        before.extend(_copied(module, module._buffers.keys() & {key}))
    states = [RandomState.now(get, put) for get, put in generators(device)]
    yield conditions
    conditions.random = [state for state in states if state.moved()]
    for held_in, was in attributes:
        replaced = ((k, v) for k, v in was.items() if held_in.get(k, v) is not v and isinstance(v, _PLAIN))
        # a structure could hold the graph of an earlier call, and each call's graph that of the one before
        conditions.attributes += [(held_in, key, _plain(value)) for key, value in replaced]
        if len(held_in) != len(was):
            conditions.attributes += [(held_in, key, _MISSING) for key in held_in.keys() - was.keys()]
    for held, copy in before:
        if _moves(held):
            conditions.loans.append((held.module, held.key, copy))
        else:
            conditions.buffers.append(held)


def _copied(module: nn.Module, keys: Iterable[str]) -> Iterator[tuple[Held, Tensor]]:
    for key in keys:
        if (buffer := module._buffers[key]) is not None:
            yield _held(module, key, buffer), buffer.detach().clone()


def _moves(held: Held) -> bool:
    """Whether a buffer was changed since, or may be by a kernel that says nothing of it (BatchNorm's statistics)."""
    now = held.module._buffers.get(held.key)
    return isinstance(held.module, AnyTrackingNorm) or now is not held.tensor or now._version != held.version


def _plain(value: Any) -> Any:
    """`value` without history, if it is a tensor with one: a graph must not hold itself."""
    has_history = isinstance(value, Tensor) and value.grad_fn is not None
    return value.detach().requires_grad_() if has_history else value


def _held(module: nn.Module, key: str, tensor: Tensor) -> Held:
    kept = _plain(tensor)  # torch.func.functional_call lends weights with a history
    return Held(module, key, kept, tensor._version, tensor.requires_grad)


def _check(held: Held, where: str) -> None:
    name = f"{type(held.module).__name__}.{held.key}"
    if held.tensor._version != held.version:
        raise ReplayError(
            f"{where}: {name} was changed in place between forward and backward, so the branch cannot be run again "
            "as it ran and its gradients would be wrong; call backward() before optimizer.step() or any other update"
        )
    if held.tensor.numel() and not held.tensor.untyped_storage().nbytes() and not held.tensor.is_meta:
        raise ReplayError(
            f"{where}: the memory of {name} was freed between forward and backward (a sharded parameter outside of its "
            "own block?), so the branch cannot be run again"
        )


@contextmanager
def _lent(owner: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    own = owner.get(key, _MISSING)
    _set(owner, key, value)
    try:
        yield
    finally:
        _set(owner, key, own)


def _set(owner: dict[str, Any], key: str, value: Any) -> None:
    if value is _MISSING:
        owner.pop(key, None)
    else:
        owner[key] = value
