"""What a traced frame looked at to decide what to run. Its graph is used only for calls that agree on all of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.pytree import is_object
from revwire.run.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revwire._torch import TreeSpec


class _Marker:
    """The type of `TENSOR`."""

    def __repr__(self) -> str:
        return "a tensor"


TENSOR = _Marker()
"""Marks the place of a tensor among the constants a frame was called with."""


@dataclass(frozen=True)
class ObjectOf:
    """Marks the place of an object with a state of its own (a KV cache): any of its class may come there."""

    cls: type


def is_tensor(value: object) -> bool:
    """Whether code that takes a tensor takes this value for one."""
    return isinstance(value, Tensor | Streams)


def constant_for(leaf: Any) -> Any:
    """What a call is compared by at the place of an argument: the argument itself where it is a constant."""
    return TENSOR if is_tensor(leaf) else ObjectOf(type(leaf)) if is_object(leaf) else leaf


def is_input(leaf: Any) -> bool:
    """Whether an argument is handed to the graph at each call, and no constant in it."""
    return is_tensor(leaf) or is_object(leaf)


@dataclass(frozen=True)
class Inlined:
    """A child whose code was traced as part of its caller's frame.

    Attributes:
        path: Where it is, below the frame's module.
        cls: Its class, whose forward was traced.
        training: The mode it was traced in, if its code can see that; else None.
        settings: As the frame's own (`Guards.settings`).
    """

    path: str
    cls: type[nn.Module]
    training: bool | None
    settings: dict[str, Any]

    def agrees(self, module: nn.Module) -> bool:
        """Whether the child of `module` at this path would still run the code that was traced."""
        child = module.get_submodule(self.path)
        as_traced = type(child) is self.cls and self.training in {None, child.training}
        return as_traced and has_settings(child, self.settings) and may_inline(child)


def may_inline(module: nn.Module) -> bool:
    """Whether a module's forward is its class's and nobody watches its calls."""
    held = module.__dict__
    hooked = any(
        held[key]
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return not hooked and "forward" not in held and not hasattr(type(module), "revwire_original")


@dataclass
class Guards:
    """What a traced frame depends on: how it was called, and what its code looked at.

    Attributes:
        spec: Structure of `(args, kwargs)`.
        constants: The leaves of that structure, with `TENSOR` for tensors.
        looked_at: What the code looked at of the input tensors: any of `"shape"`, `"dtype"`, `"device"`.
        training: The mode it was traced in, if the frame's own code can see `self.training`; else None.
        settings: The module's numbers, flags and words that its code can see (`self.drop_rate`).
        attributes: Attributes that the code read of objects it was given: (leaf, names) to the value.
        inlined: Children whose code is part of the frame's graph, by path.
    """

    spec: TreeSpec | None = None
    constants: tuple[Any, ...] = ()
    looked_at: set[str] = field(default_factory=set)
    training: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[int, tuple[str, ...]], Any] = field(default_factory=dict)
    inlined: dict[str, Inlined] = field(default_factory=dict)
    _properties: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def seal(self, leaves: Sequence[Any]) -> None:
        """Note what the frame's code saw of these input leaves, when it has run."""
        self._properties = {key: _properties(key, leaves) for key in sorted(self.looked_at)}

    def hold(self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> bool:
        """Whether a call of `module` with these argument leaves runs the code that was traced."""
        if self.inlined and not all(child.agrees(module) for child in self.inlined.values()):
            return False
        if self.training not in {None, module.training}:
            return False
        if len(leaves) != len(self.constants) or spec != self.spec:
            return False
        for leaf, constant in zip(leaves, self.constants, strict=True):
            found = constant_for(leaf)
            if found is not constant and not same(found, constant):
                return False
        if not has_settings(module, self.settings):
            return False
        if any(not same(_read(leaves[i], names), value) for (i, names), value in self.attributes.items()):
            return False
        return all(_properties(key, leaves) == value for key, value in self._properties.items())


def _read(leaf: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        leaf = getattr(leaf, name, None)
    return leaf


def _properties(key: str, leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, key) for leaf in leaves if is_tensor(leaf))


def names_in(cls: type, *, entry: str | None = None) -> frozenset[str]:
    """The names and words that a module class's own methods mention.

    Args:
        cls: The class.
        entry: Look into this method and those that it mentions, alone; else into all.
    """
    written: dict[str, list[CodeType]] = {}
    for owner in _own_classes(cls):
        for name, value in vars(owner).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if hasattr(function, "__code__"):
                written.setdefault(name, []).append(function.__code__)
    names = set[str]()
    waiting = [code for name, codes in written.items() if entry in {None, name} for code in codes]
    while waiting:
        code = waiting.pop()
        mentioned = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        if entry is not None:
            waiting.extend(c for name in mentioned - names for c in written.get(name, ()))
        names |= mentioned
        waiting.extend(c for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(names)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The numbers, flags, words and lists of such that a module's forward mentions of it, the mode aside."""
    mentioned = names_in(type(module), entry="forward") - {"training"}
    of_class: dict[str, Any] = {}
    for owner in reversed(_own_classes(type(module))):
        of_class |= vars(owner)
    held = (of_class | module.__dict__).items()
    return {key: copy.copy(value) for key, value in held if key in mentioned and _is_setting(value)}


def _own_classes(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]


_ABSENT = object()


def _is_setting(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, bool | int | float | complex | str | None | Enum | torch.dtype)


def has_settings(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Whether a module's settings are these."""
    return all(same(getattr(module, key, _ABSENT), value) for key, value in settings.items())


def same(one: object, other: object) -> bool:
    """Whether a value is the one that code was traced with."""
    try:
        if one is other or (type(one) is type(other) and bool(one == other)):
            return True
        return isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    except Exception:  # noqa: BLE001 - an object whose == is no yes or no is another object
        return False
