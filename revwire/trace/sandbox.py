"""Attributes, caches and random states as they were: running a model to look at it must not change it."""

from __future__ import annotations

import functools
import random
import sys
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

_Cached = type(functools.lru_cache(len))


@contextmanager
def uncached(root: nn.Module) -> Iterator[None]:
    """For the length of the block, functions of the model's source files compute what `lru_cache` would keep.

    A table made while the model is looked at holds no numbers; found in the cache by the next real run, it would be
    taken for one.
    """
    undo: list[Callable[[], None]] = []
    files = {base.__module__ for module in root.modules() for base in type(module).__mro__}
    for name in files:
        if name.partition(".")[0] not in {"torch", "builtins"} and name in sys.modules:
            _uncache(vars(sys.modules[name]), undo)
    for cls in {base for module in root.modules() for base in type(module).__mro__}:
        for key, value in list(vars(cls).items()):
            if type(value) is _Cached:
                undo.append(functools.partial(setattr, cls, key, value))
                setattr(cls, key, value.__wrapped__)
            elif isinstance(value, FunctionType):
                _uncache_closure(value, undo)
    try:
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def _uncache(names: dict[str, Any], undo: list[Callable[[], None]]) -> None:
    for key, value in list(names.items()):
        if type(value) is _Cached:
            undo.append(functools.partial(names.__setitem__, key, value))
            names[key] = value.__wrapped__
        elif isinstance(value, FunctionType):
            _uncache_closure(value, undo)


def _uncache_closure(function: FunctionType, undo: list[Callable[[], None]]) -> None:
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
        if type(value) is _Cached:
            undo.append(functools.partial(setattr, cell, "cell_contents", value))
            cell.cell_contents = value.__wrapped__


class Attributes:
    """What a module holds at one moment, also inside of its dicts and lists (a cache of attention biases)."""

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[tuple[str, Any, Any]] = []
        for store in (module._parameters, module._buffers):
            self._kept.append(("", store, dict(store)))
        self._keep("", module.__dict__, set())

    def _keep(self, name: str, container: Any, seen: set[int]) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        self._kept.append((name, container, container.copy()))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            # modules are kept one by one, and hooks are none of a forward's business
            if isinstance(value, dict | list) and not (not name and str(key).startswith("_")):
                self._keep(name or str(key), value, seen)

    def changed(self) -> list[str]:
        """Names of the attributes that are not what they were."""
        names: set[str] = set()
        for name, container, content in self._kept:
            now, was = _entries(container), _entries(content)
            differing = {key for key in now.keys() | was.keys() if now.get(key, was) is not was.get(key, now)}
            names.update({name} if name and differing else map(str, differing))
        return sorted(names)

    def put_back(self) -> None:
        """Make it as it was."""
        for _, container, content in self._kept:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _entries(container: Any) -> dict[Any, Any]:
    return container if isinstance(container, dict) else dict(enumerate(container))


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Every module's attributes, parameters and buffers as they were, whatever a forward stores in them."""
    kept = [Attributes(module) for module in root.modules()]
    try:
        yield
    finally:
        for attributes in kept:
            attributes.put_back()


@contextmanager
def random_kept() -> Iterator[None]:
    """The generators of torch and Python as they were, whatever the block draws."""
    state, python = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)


def python_random() -> Any:
    """The states of the generators that Python code decides by: Python's, and numpy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    _, words, position, *rest = numpy.random.get_state()
    # one draw moves the position alone
    return random.getstate(), (words.tobytes(), position, *rest)
