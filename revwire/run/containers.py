"""Containers as they were: compared by the objects in them, and put back in place for whoever shares them."""

from __future__ import annotations

import sys
from itertools import chain
from operator import is_, methodcaller
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from contextlib import ExitStack

INTERNAL = frozenset(nn.Module().__dict__)
"""The attributes of every module: its mode, and torch's own tables of what it holds."""

_MISSING = object()
_values_of = methodcaller("values")


class Part(dict[Any, Any]):
    """The one entry of a container that a branch reads."""


def is_plain_object(value: object) -> bool:
    """Whether a value is data with attributes, and no part of Python's or torch's own machinery."""
    if type(value) is SimpleNamespace:
        return True
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    library = type(value).__module__.partition(".")[0]
    return library != "torch" and (library == "__main__" or library not in sys.stdlib_module_names)


def same(container: Any, content: Any) -> bool:
    """Whether a container holds the very objects that were noted."""
    if isinstance(content, Part):
        return all(container.get(key, _MISSING) is value for key, value in content.items())
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(map(is_, container.values(), content.values())) and [*container] == [*content]
    if isinstance(container, set):
        return bool(container == content)
    return all(map(is_, container, content))


def swap(container: Any, content: Any, stack: ExitStack) -> None:
    """Put content into a container; leaving the stack puts back what is there now."""
    if isinstance(content, Part):
        stack.callback(_set, container, {key: container.get(key, _MISSING) for key in content})
        _set(container, content)
        return
    now: Any = dict(container) if isinstance(container, dict) else list(container)
    stack.callback(_fill, container, now)
    _fill(container, content)


def _set(container: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key, value in entries.items():
        if value is _MISSING:
            container.pop(key, None)
        else:
            container[key] = value


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        # entry by entry: another thread that looks meanwhile never finds it empty
        for key in [key for key in container if key not in content]:
            del container[key]
        if list(container) == [key for key in content if key in container]:
            container.update(content)
        else:
            container.clear()
            container.update(content)
    elif isinstance(container, list):
        container[:] = content
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    else:
        container.clear()
        container.extend(content)


class SameDicts:
    """Dicts, and what was noted of them."""

    def __init__(self) -> None:
        self._now: list[dict[Any, Any]] = []
        self._lengths: list[int] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []

    def add(self, now: dict[Any, Any], noted: dict[Any, Any]) -> None:
        """Note one more."""
        self._now.append(now)
        self._lengths.append(len(noted))
        self._keys += noted
        self._values += noted.values()

    def there(self) -> bool:
        """Whether all hold the very objects that were noted, in the same order."""
        now = self._now
        if [*map(len, now)] != self._lengths or [*chain.from_iterable(now)] != self._keys:
            return False
        return all(map(is_, chain.from_iterable(map(_values_of, now)), self._values))
