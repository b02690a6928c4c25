"""What modules hold, noted and put back: running a model to look at it must leave it as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


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
