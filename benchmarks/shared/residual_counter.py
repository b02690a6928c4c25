"""Count residual additions among the operators that a forward runs, as a second opinion on what revwire plans.

revwire looks at the code of modules. This looks at operators alone, whatever the code: a residual is a sum of two
tensors of one shape of which one was computed from the other; a second one continues its trunk if its skip is the first
one's sum, at most rearranged or activated. Sums inside branches count like any others, so this sees more than can be
rewired, never less (but for sums of several branches at once).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_VIEWS = {
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.permute, _aten.transpose, _aten.t, _aten.unsqueeze,
    _aten.squeeze, _aten.clone, _aten.alias, _aten.detach, _aten.expand, _aten._reshape_alias, _aten.contiguous,
}  # fmt: skip
_ACTIVATIONS = {
    _aten.relu, _aten.relu_, _aten.silu, _aten.silu_, _aten.gelu, _aten.hardswish, _aten.hardswish_, _aten.hardtanh,
    _aten.hardtanh_, _aten.leaky_relu, _aten.leaky_relu_, _aten.elu, _aten.tanh, _aten.sigmoid, _aten.mish,
}  # fmt: skip
_SUMS = {_aten.add, _aten.add_}


@dataclass(frozen=True)
class _Value:
    """A tensor as it was when an operator returned it; tensors are numbered in the order in which they are seen.

    Attributes:
        order: Its number.
        parents: What it was computed from.
        viewed: Number of the tensor whose values it shows, rearranged; its own if it is computed.
        trunk: Number of the tensor that it is a rearrangement or an activation of; its own if it is neither.
    """

    order: int
    parents: tuple[_Value, ...]
    viewed: int
    trunk: int


class ResidualCounter(TorchDispatchMode):
    """Counts the residual additions of what runs inside it.

    Attributes:
        longest: Residuals in the longest run of them on one trunk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self._values: dict[int, _Value] = {}
        self._alive: list[Tensor] = []
        self._length: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [self._value(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            order = self._next()
            source = given[0] if given else None
            passes = source is not None and packet in _VIEWS
            viewed = source.viewed if passes else order
            trunk = source.trunk if source is not None and (passes or packet in _ACTIVATIONS) else order
            self._keep(tensor, _Value(order, tuple(given), viewed, trunk))
            if packet in _SUMS and len(given) == 2 and args[0].shape == args[1].shape:
                self._see_sum(order, *given)
        return out

    def _see_sum(self, order: int, left: _Value, right: _Value) -> None:
        for skip, branch in ((left, right), (right, left)):
            if _computed_from(branch, skip):
                length = self._length.get(skip.trunk, 0) + 1
                self._length[order] = length
                self.longest = max(self.longest, length)
                return

    def _value(self, tensor: Tensor) -> _Value:
        if (known := self._values.get(id(tensor))) is None:
            order = self._next()
            known = self._keep(tensor, _Value(order, (), order, order))
        return known

    def _keep(self, tensor: Tensor, value: _Value) -> _Value:
        self._alive.append(tensor)  # ids are keys, so none may be used twice
        self._values[id(tensor)] = value
        return value

    def _next(self) -> int:
        self._count += 1
        return self._count


def _computed_from(value: _Value, source: _Value) -> bool:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current.viewed == source.viewed:
            return current is not value
        waiting.extend(p for p in current.parents if p.order >= source.viewed and p.order not in seen)
        seen.update(p.order for p in current.parents)
    return False
