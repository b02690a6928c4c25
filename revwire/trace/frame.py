"""One call of one module, as a recorded run saw it: its graph, and what the graph depends on."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from revwire.pytree import is_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from revwire._torch import TreeSpec


class TraceFailure(Exception):
    """A frame does something that a graph of it would not reproduce. Its message completes "the frame ..."."""


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


def constant_for(leaf: Any) -> Any:
    """What a call is compared by at the place of an argument: the argument itself where it is a constant."""
    return TENSOR if isinstance(leaf, Tensor) else ObjectOf(type(leaf)) if is_object(leaf) else leaf


def is_input(leaf: Any) -> bool:
    """Whether an argument is handed to the graph at each call, and no constant in it."""
    return isinstance(leaf, Tensor) or is_object(leaf)


Identity = tuple[int, int]
"""A tensor as it was at one moment: the object and its in-place version."""


def identity(value: Any) -> Identity:
    """What tells two traced values apart: the tensor object and how often it was changed in place."""
    return id(value), value._version


@dataclass
class Guards:
    """What a traced frame looked at, beyond the structure of its arguments, to decide what to run.

    Attributes:
        properties: Of the input tensors: any of `"shape"`, `"dtype"`, `"device"`.
        training: The mode it was traced in, if the frame's own code can see `self.training`; else None.
        settings: The module's numbers, flags and words that its code can see (`self.drop_rate`).
        attributes: Attributes that the code read of objects it was given: (placeholder, names) to the value.
    """

    properties: set[str] = field(default_factory=set)
    training: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[str, tuple[str, ...]], Any] = field(default_factory=dict)


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
class Frame:
    """One call of one module during a recorded run.

    Attributes:
        path: The module's path in the model.
        module: The module.
        graph: The frame's graph, or None with `failure` saying why there is none.
        guards: What the graph depends on.
        spec: Structure of `(args, kwargs)`.
        constants: The leaves of that structure, with `TENSOR` for tensors.
        arguments: The leaves' names in the signature of `forward`.
        output: How the graph's leaves make up what the frame returns; None for one value or a tuple of values.
        inlined: Children whose code is part of this frame's graph, by path.
        parent: The frame that called this one, and `caller` the node of its graph that did.
    """

    path: str
    module: nn.Module
    graph: fx.Graph | None = None
    failure: str | None = None
    guards: Guards = field(default_factory=Guards)
    spec: TreeSpec | None = None
    constants: tuple[Any, ...] = ()
    arguments: tuple[str, ...] = ()
    output: TreeSpec | None = None
    inlined: dict[str, Inlined] = field(default_factory=dict)
    parent: Frame | None = None
    caller: fx.Node | None = None

    @property
    def callers(self) -> Iterator[fx.Node]:
        """The nodes of the calls that this one runs in, the nearest first."""
        around: Frame | None = self
        while around is not None and around.caller is not None:
            yield around.caller
            around = around.parent

    def label(self, node: fx.Node) -> str:
        """What the author of the frame calls a node: the argument's name, or the node's own."""
        return (
            self.arguments[int(str(node.target)[len("input_") :])] if node.op == "placeholder" else node.name
        )


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


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as its author wrote it, also where revwire has put another in its place."""
    written = getattr(type(module), "revwire_original", None)
    if written is None or "forward" in module.__dict__:
        return module.forward
    bound: Callable[..., Any] = written.forward.__get__(module)
    return bound


def storage(tensor: Tensor) -> int:
    """What a tensor and its views have in common."""
    base = tensor._base
    return id(tensor if base is None else base)
