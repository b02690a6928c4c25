"""What modules hold beside their weights, at one moment: whether a run changes any of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.pytree import is_object

if TYPE_CHECKING:
    from collections.abc import Iterator

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 5


class State:
    """What a module, and those below it, hold: tensors with their numbers, plain values, containers, objects."""

    def __init__(self, module: nn.Module) -> None:
        self._held = {
            f"{path}.{key}".lstrip("."): _taken(value, 0)
            for path, each in module.named_modules()
            for key, value in _entries(each)
        }

    def changed(self, later: State, *, caches: bool = False) -> list[str]:
        """Names of what is not as it was.

        Args:
            later: What is held now.
            caches: Whether a dict may have further entries: what is kept by shape is kept for each shape that comes.
        """
        names = self._held.keys() | later._held.keys()
        return sorted(
            name for name in names if not _same(self._held.get(name), later._held.get(name), caches=caches)
        )


def _entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from ((key, value) for key, value in vars(module).items() if key not in _OF_TORCH)


_OF_TORCH = frozenset(vars(nn.Module()))


def _taken(value: Any, depth: int) -> Any:
    """A value as it is now, to compare; what cannot be looked into is taken by identity."""
    if isinstance(value, Tensor):
        # another object of the same numbers is what a run has left here
        return "tensor", id(value), value.detach().clone()
    if isinstance(value, _PLAIN):
        return "plain", type(value), value
    if isinstance(value, torch.Generator):
        return "tensor", id(value), value.get_state()
    if isinstance(value, random.Random):
        return "plain", type(value), value.getstate()
    if depth == _DEPTH or isinstance(value, nn.Module):
        return "plain", type(value), id(value)
    if isinstance(value, dict):
        return "dict", type(value), {key: _taken(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) or hasattr(value, "appendleft"):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return "list", type(value), [_taken(item, depth + 1) for item in items]
    if is_object(value):
        own = {f".{key}": _taken(item, depth + 1) for key, item in vars(value).items()}
        return "object", (type(value), id(value)), own
    # counters of itertools tell how far they are; functions where they are
    return "plain", type(value), repr(value)


def _same(one: Any, other: Any, *, caches: bool) -> bool:
    if one is None or other is None or one[:2] != other[:2]:
        return False
    kind, _, was = one
    now = other[2]
    if kind == "tensor":
        return was.shape == now.shape and bool(torch.equal(was.nan_to_num(), now.nan_to_num()))
    if kind == "list":
        return len(was) == len(now) and all(_same(a, b, caches=caches) for a, b in zip(was, now, strict=True))
    if kind in {"dict", "object"}:
        known = was.keys() <= now.keys() if caches and kind == "dict" else was.keys() == now.keys()
        return known and all(_same(was[key], now[key], caches=caches) for key in was)
    return bool(was == now or (was != was and now != now))
