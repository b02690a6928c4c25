"""Running a model to look at it must leave it as it was: attributes and random states, noted and put back."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


class Attributes:
    """What a module holds at one moment, also inside of its dicts and lists (a cache of attention biases)."""

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[tuple[str, Any, Any]] = []
        if isinstance(module, torch.jit.ScriptModule):
            return  # what it holds is not Python's, and its code reaches nothing else
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
            if isinstance(container, list):
                if len(container) != len(content) or any(
                    a is not b for a, b in zip(container, content, strict=True)
                ):
                    container[:] = content
            elif list(container) != list(content):
                _put_back_keys(container, content)
            else:
                # never empty for a moment: another thread may be running the module
                container.update({k: v for k, v in content.items() if container[k] is not v})


def _put_back_keys(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    """A dict as it was, the order of its keys too, and those that it keeps always there."""
    for key in container.keys() - content.keys():
        del container[key]
    container.update(content)
    if list(container) != list(content):
        for key, value in content.items():
            del container[key]
            container[key] = value


def _entries(container: Any) -> dict[Any, Any]:
    return container if isinstance(container, dict) else dict(enumerate(container))


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Every module's attributes, parameters and buffers as they were, whatever a forward stores in them."""
    kept = [Attributes(module) for module in root.modules()]
    # theirs cannot be others while a model is looked at
    scripted = [
        (buffer, buffer._version, buffer.detach().clone())
        for module in root.modules()
        if isinstance(module, torch.jit.ScriptModule)
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for attributes in kept:
            attributes.put_back()
        for buffer, version, was in scripted:
            if buffer._version != version:
                buffer.data.copy_(was)


@contextmanager
def random_kept(*, drawn: bool) -> Iterator[None]:
    """The generators of Python, numpy and torch as they were, whatever the block draws.

    Args:
        drawn: Whether numbers are drawn of torch's generators too. On fake tensors none are; to put back what has
            not moved would take away what another thread drew meanwhile.
    """
    numpy = sys.modules.get("numpy")
    python, state = random.getstate(), numpy.random.get_state() if numpy else None
    before = python_random()
    devices = range(torch.cuda.device_count()) if drawn and torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices) if drawn else nullcontext():
        try:
            yield
        finally:
            if python_random() != before:
                random.setstate(python)
                if numpy:
                    numpy.random.set_state(state)


def python_random() -> Any:
    """The states of the generators that Python code decides by: Python's, and numpy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    _, words, position, *rest = numpy.random.get_state()
    # one draw moves the position alone
    return random.getstate(), (words.tobytes(), position, *rest)
