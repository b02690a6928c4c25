"""What a name stands for, as it is now: plain values, functions, objects, containers."""

from __future__ import annotations

import functools
import logging
from contextvars import ContextVar
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.trace.code import Bypass, Cached, entry_of, functions_in, home, is_foreign, owners
from revwire.trace.names import Names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# what is one object wherever it is
_SINGLE = (bool, type(None), type(...), Enum, torch.dtype, torch.layout, torch.memory_format)
_PLAIN = (int, float, complex, str, bytes, range, slice, torch.Size, torch.device)
PLAIN = (*_SINGLE, *_PLAIN)
"""What is compared by value, or is one object wherever it is."""

_SKIPPED = (logging.Logger, logging.LoggerAdapter, torch.Generator)

_SHAPES = {"shape", "size", "ndim", "dim", "numel", "nelement", "len", "stride"}
_TYPES = {"dtype", "type", "is_floating_point", "is_complex", "element_size", "itemsize"}
_BUILT_IN = (list, tuple, dict, set, frozenset)

DEEP = 8  # attributes of attributes; nobody writes longer paths
_LONG = 64  # containers with more are compared as wholes
# called without being mentioned
_CALLED = {"__init__", "__new__", "__post_init__", "__call__"}
_OPERATORS = {
    "__call__",
    "__getitem__",
    "__len__",
    "__iter__",
    "__next__",
    "__contains__",
    "__bool__",
    "__enter__",
}
_OPERATORS |= {
    "__exit__",
    "__eq__",
    "__lt__",
    "__gt__",
    "__neg__",
    "__index__",
    "__int__",
    "__float__",
    "__getattr__",
}
_OPERATORS |= {
    f"__{r}{name}__" for r in ("", "r") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}


class Values(Names):
    """Writes down what values are.

    Attributes:
        absent: Names that the code goes on without where they are not there.
        caches: What tables, objects and globals held that the code fills (`Outside.filled`).
    """

    def __init__(self, caches: Mapping[Any, Any]) -> None:
        super().__init__()
        self.absent: set[str] = set()
        self.caches = caches

    def module(self, module: nn.Module, at: str, depth: int) -> None:
        """A module."""
        raise NotImplementedError

    def visit(self, value: Any, at: str, depth: int) -> None:
        """Demand that what the function finds `at` this place is what `value` is."""
        if isinstance(value, Bypass):  # for as long as this is traced
            value = value.cached
        kind = type(value)
        if isinstance(value, _SINGLE):
            self.demand(f"{at} is {self.constant(value)}")
        elif kind in _PLAIN or (kind.__module__ == "numpy" and not hasattr(value, "__dict__")):
            self._plain(value, at)
        elif isinstance(value, Tensor):
            self._tensor(value, at)
        elif isinstance(value, _SKIPPED) or depth > DEEP:
            pass
        elif id(value) in self.seen:
            self.demand(f"{at} is {self.seen[id(value)]}")
        elif isinstance(value, nn.Module):
            self.module(value, at, depth)
        elif (
            isinstance(value, type | ModuleType | FunctionType | MethodType | BuiltinFunctionType)
            or kind is Cached
        ):
            self._code(value, at, depth)
        else:
            self._object(value, at, depth)

    def _plain(self, value: Any, at: str) -> None:
        if type(value).__name__ == "ndarray":
            if value.nbytes <= 4096:
                self.demand(f"{at}.tobytes() == {value.tobytes()!r}")
            return
        constant = self.constant(value)
        self.demand(f"(v := {at}) is {constant} or same(v, {constant})")

    def _tensor(self, value: Tensor, at: str) -> None:
        """That there is one: its numbers are read by the graph, what it is like may decide what the code does."""
        self.lines.append(f"v = {at}")
        self.demand("isinstance(v, Tensor)")
        looks = (("shape", _SHAPES), ("dtype", _TYPES), ("device", {"device", "is_cuda", "get_device"}))
        for name, words in looks:
            if self.mentions(words):
                self.demand(f"v.{name} == {self.constant(getattr(value, name))}")

    def _code(self, value: Any, at: str, depth: int) -> None:
        if isinstance(value, MethodType):
            self.visit(value.__func__, f"{at}.__func__", depth + 1)
            self.visit(value.__self__, f"{at}.__self__", depth + 1)
            return
        if isinstance(value, BuiltinFunctionType) and not isinstance(
            value.__self__, ModuleType | type | None
        ):
            return  # a method of something that is looked at where it is held
        constant = self.constant(value)
        self.demand(f"{at} is {constant}")
        self.seen[id(value)] = constant
        for function in functions_in(value):
            self.follow(function)
        if isinstance(value, ModuleType):
            self._library(value, constant, depth)
        elif isinstance(value, type) and not is_foreign(home(value)) and not issubclass(value, Enum):
            self.members(value, (), depth)
            if not issubclass(value, nn.Module):
                for name in _CALLED:
                    for function in functions_in((entry_of(value, name) or (None, None))[1]):
                        self.follow(function)

    def _library(self, module: ModuleType, at: str, depth: int) -> None:
        """A module of Python's: of torch's the functions alone, of its own library whatever is mentioned."""
        held = vars(module)
        torchs = module.__name__.partition(".")[0] == "torch"
        if is_foreign(module.__name__) and not torchs:
            return
        for name in self.named(held.keys()):
            value = held[name]
            wanted = not torchs or isinstance(value, FunctionType | ModuleType | BuiltinFunctionType)
            if name.startswith("__") or not wanted or (id(held), name) in self.caches:
                continue
            self.visit(value, f"{at}.__dict__[{name!r}]", depth + 1)

    def members(self, cls: type, hidden: Iterable[str], depth: int) -> list[str]:
        """What a class and its bases hold of the names mentioned; returns those names."""
        found, of_class = {"forward", *hidden}, list[str]()
        for owner in owners(cls):
            torchs = is_foreign(home(owner))
            if torchs and not issubclass(owner, nn.Module):
                continue  # an object of Python's own
            held = vars(owner)
            for name in self.named(held.keys()):
                # a child's forward is its own affair; where the code calls one by name, it was seen to run
                if name in found or name.startswith("__"):
                    continue
                found.add(name)
                of_class.append(name)
                if not depth:
                    self.hop -= 1  # the methods of the module itself are as near as its forward
                at = f"{self.constant(held)}[{name!r}]"
                functions = list(functions_in(held[name]))
                for function in functions:
                    self.follow(function, whole=True)
                if functions:
                    if not torchs:
                        self.demand_member(held[name], at)
                else:
                    self.visit(held[name], at, depth + 1)
        return of_class

    def appears(self, held: Iterable[str], places: list[str], cls: type) -> None:
        """Demand that what the code may ask for, and is not there, has not come."""
        if self.absent and (names := self.absent.difference(held, dir(cls))):
            classes = [owner for owner in owners(cls) if not is_foreign(home(owner))]
            self.lacks(names, places + [self.constant(vars(owner)) for owner in classes])

    def lacks(self, names: Iterable[str], places: list[str]) -> None:
        """Demand that something holds none of these names."""
        if not (names := sorted(names)):
            return
        if len(names) < 3:
            self.demand(" and ".join(f"{name!r} not in {place}" for name in names for place in places))
        else:
            wanted = self.constant(frozenset(names))
            self.demand(" and ".join(f"{wanted}.isdisjoint({place})" for place in places))

    def _object(self, value: Any, at: str, depth: int) -> None:
        cls = type(value)
        if isinstance(value, ContextVar):
            content = value.get(None)
            if isinstance(content, PLAIN):
                self.visit(content, f"{at}.get(None)", depth + 1)
            return
        at = self.variable(at)
        self.seen[id(value)] = at
        self.demand(f"type({at}) is {self.constant(cls)}")
        if id(value) in self.caches:
            return
        if isinstance(value, list | tuple | dict | set | frozenset):
            self._container(value, at, depth)
        if cls not in _BUILT_IN:
            self._attributes(value, at, depth)
        if isinstance(value, functools.partial):
            for function in functions_in(value):
                self.follow(function)
            for part in ("func", "args", "keywords"):
                self.visit(getattr(value, part), f"{at}.{part}", depth + 1)

    def _attributes(self, value: Any, at: str, depth: int) -> None:
        """What is mentioned of an object's own attributes, and of its class's."""
        cls, held = type(value), getattr(value, "__dict__", None)
        d = at
        if held is not None:
            d, held = self.variable(f"{at}.__dict__"), self.caches.get(id(held), held)
            # a class that answers for other names than it holds is taken as a whole
            answers = any(entry_of(cls, name) for name in ("__getattr__", "__getattribute__"))
            for name in sorted(held) if answers or self.computed else self.named(held.keys()):
                self.visit(held[name], f"{d}[{name!r}]", depth + 1)
            if self.computed:
                self.demand(f"{self.constant(frozenset(held))}.issuperset({d})")
        slots = {name for owner in cls.__mro__ for name in _slots(owner)}
        for name in self.named(slots):
            if hasattr(value, name):
                self.visit(getattr(value, name), f"{at}.{name}", depth + 1)
        of_class: list[str] = []
        if not is_foreign(home(cls)):
            self._called(cls)
            of_class = self.members(cls, [*(held or ()), *slots], depth + 1)
        if held is not None:
            self.lacks(of_class, [d])
            self.appears((*held, *of_class), [d], cls)

    def _called(self, cls: type) -> None:
        """Follow what Python calls of an object by itself."""
        for owner in owners(cls):
            if not is_foreign(home(owner)):
                for name, member in list(vars(owner).items()):
                    if name in _OPERATORS:
                        for function in functions_in(member):
                            self.follow(function)

    def _container(self, value: Any, at: str, depth: int) -> None:
        kind = next(kind for kind in _BUILT_IN if isinstance(value, kind))
        whole = isinstance(value, set | frozenset) or len(value) > _LONG
        items = list(kind.values(value) if kind is dict else kind.__iter__(value))
        if whole and type(value) is kind and all(isinstance(item, PLAIN) for item in items):
            self.demand(f"{at} == {self.constant(kind(value))}")
            return
        keys = list(dict.keys(value)) if kind is dict else list(range(len(items)))
        asked = kind is dict and type(value).__getitem__ is not dict.__getitem__
        if whole or asked or not all(isinstance(key, PLAIN) for key in keys):
            self.demand(f"{self.constant(kind)}.__len__({at}) == {len(items)}")
            return
        self.demand(f"[*{at}] == {self.constant(keys)}" if kind is dict else f"len({at}) == {len(items)}")
        for key, item in zip(keys, items, strict=True):
            self.visit(item, f"{at}[{key if isinstance(key, int) else self.constant(key)}]", depth + 1)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
