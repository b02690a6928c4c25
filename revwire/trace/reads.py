"""What a frame's code reads beside its arguments: found by the names that it mentions, checked by code made of that.

Whatever the code may read, by any path from the module, a global or a closure, is noted as it is: plain values by
value, functions and classes by identity, objects and containers by what is in them. Not by their own identity, as a
deep copy of a model runs the same code. More is noted than the code reads (a name stands for every attribute of that
name), never less; what it costs is another trace where something changed that did not matter.
"""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.trace.code import Bypass, Cached, Mentioned, entry_of, functions_in, is_foreign, mentioned, owners
from revwire.trace.same import same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_INTERNAL = {*nn.Module().__dict__, "training"}
_STORES = ("_modules", "_parameters", "_buffers")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# what is one object wherever it is
_SINGLE = (bool, type(None), type(...), Enum, torch.dtype, torch.layout, torch.memory_format)
_PLAIN = (int, float, complex, str, bytes, range, slice, torch.Size, torch.device)
_SKIPPED = (logging.Logger, logging.LoggerAdapter, torch.Generator)

# how code goes on where an attribute is not there
_CATCHES = {"AttributeError", "Exception", "BaseException", "suppress"}
_KINDS = {"isinstance", "issubclass", "type", "__class__"}
_SHAPES = {"shape", "size", "ndim", "dim", "numel", "nelement", "len", "stride"}
_TYPES = {"dtype", "type", "is_floating_point", "is_complex", "element_size", "itemsize"}
_ALL_BELOW = {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule"}

_CONTEXTS: dict[str, Callable[[], Any]] = {
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "get_default_dtype": torch.get_default_dtype,
    "is_autocast_enabled": lambda: tuple(map(torch.is_autocast_enabled, ("cpu", "cuda"))),
    "is_autocast_cpu_enabled": lambda: torch.is_autocast_enabled("cpu"),
    "get_autocast_dtype": lambda: tuple(map(torch.get_autocast_dtype, ("cpu", "cuda"))),
    "get_autocast_cpu_dtype": lambda: torch.get_autocast_dtype("cpu"),
    "get_autocast_gpu_dtype": lambda: torch.get_autocast_dtype("cuda"),
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
}

_DEEP = 8  # attributes of attributes; nobody writes longer paths
_LONG = 64  # containers with more are compared as wholes
_HOPS = 2  # code that touches a tensor is seen to run; beyond it, so many calls away are followed
_PASSES = 12  # each follows the names that the code found by the one before mentions
# called without being mentioned
_CALLED = {"__init__", "__new__", "__post_init__", "__call__"}
_OPERATORS = {"__call__", "__getitem__", "__len__", "__iter__", "__next__", "__contains__", "__bool__", "__enter__"}
_OPERATORS |= {"__exit__", "__eq__", "__lt__", "__gt__", "__neg__", "__index__", "__int__", "__float__", "__getattr__"}
_OPERATORS |= {f"__{r}{name}__" for r in ("", "r") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


class Reads:
    """What the code of a module's frame reads, as it was when this was made.

    Args:
        module: The module.
        ran: Code that was seen to run: each code object with the globals that it looks names up in.
        below: Paths of children whose own forward counts too.
        caches: What tables and objects held, by the id of the table, that the code fills.
    """

    def __init__(
        self,
        module: nn.Module,
        ran: Iterable[tuple[CodeType, dict[str, Any]]] = (),
        below: Iterable[str] = (),
        caches: Mapping[int, Any] | None = None,
    ) -> None:
        walk = _Walk(module, tuple(ran), tuple(below), caches or {})
        self._source = walk.source()
        self._namespace = walk.namespace
        self._check: Callable[[nn.Module], bool] | None = None

    def hold(self, module: nn.Module) -> bool:
        """Whether the code would read the same of this module (the one that was looked at, or a copy) and around it."""
        if self._check is None:
            exec(compile(self._source, "<revwire guards>", "exec"), self._namespace)  # noqa: S102 - written below
            self._check = self._namespace["check"]
        return self._check(module)


class _Walk:
    """Follows what code mentions, and writes down a check of what it finds."""

    def __init__(
        self,
        module: nn.Module,
        ran: Iterable[tuple[CodeType, dict[str, Any]]],
        below: tuple[str, ...],
        caches: Mapping[int, Any],
    ) -> None:
        # how many calls of functions away from code that ran a name is mentioned
        self.names: dict[str, int] = {}
        self.words: set[str] = set()
        self._asked: set[str] = set()
        self._computed = False
        self._functions: dict[int, FunctionType] = {}
        self._ran = [(code, held) for code, held in ran if not is_foreign(held.get("__name__"))]
        self._hops: dict[int, int] = {}
        self._hop = 0
        self._below = below
        self._caches = caches
        for code, _ in ran:
            self._mention(code)
        for each in (module, *map(module.get_submodule, below)):
            for function in functions_in((entry_of(type(each), "forward") or (None, None))[1]):
                self._follow(function, whole=True)
        for _ in range(_PASSES):
            known = len(self.names), len(self._functions)
            self._pass(module)
            if known == (len(self.names), len(self._functions)):
                break

    def source(self) -> str:
        """The check, as Python code."""
        body = "\n".join(f"  {line}" for line in self._lines)
        errors = "(KeyError, AttributeError, IndexError, TypeError, ValueError, LookupError)"
        return f"def check(self):\n try:\n{body}\n  return True\n except {errors}:\n  return False\n"

    def _pass(self, module: nn.Module) -> None:
        self.namespace: dict[str, Any] = {"same": same, "kind_of": _kind_of, "Tensor": Tensor}
        self._lines: list[str] = []
        self._seen: dict[int, str] = {}
        self._globals: set[tuple[int, str]] = set()
        self._variables = 0
        self._absent = set(self._asked)
        if not self.names.keys().isdisjoint(_CATCHES):
            self._absent |= self.names.keys()
        for name in sorted(self.names.keys() & _CONTEXTS.keys()):
            self._demand(f"same({self._constant(_CONTEXTS[name])}(), {self._constant(_CONTEXTS[name]())})")
        if not self.names.keys().isdisjoint({"environ", "getenv"}):
            for word in sorted(word for word in self.words if word.isupper()):
                self._demand(f"{self._constant(os.environ)}.get({word!r}) == {os.environ.get(word)!r}")
        self._root(module, "self")
        for path in self._below:
            at = "self" + "".join(f".__dict__['_modules'][{name!r}]" for name in path.split("."))
            self._root(module.get_submodule(path), at)
        for code, held in self._ran:
            self._hop = 0
            self._code_globals(code, held)
        done = 0
        while done < len(self._functions):  # more are found on the way
            self._function(list(self._functions.values())[done])
            done += 1

    def _root(self, module: nn.Module, at: str) -> None:
        """A module whose own forward is among the code."""
        if (entry := entry_of(type(module), "forward")) is not None:
            owner, member = entry
            self._demand(f"{self._constant(vars(owner))}['forward'] is {self._constant(member)}")
        if id(module) not in self._seen:
            self._module(module, at, 0)

    def _follow(self, function: FunctionType, *, whole: bool = False) -> None:
        """Take a function for code that may run; `whole`: torch's own too, if it is a module's."""
        if self._hop > _HOPS or id(function) in self._functions:
            return
        if whole or not is_foreign(function.__module__):
            self._functions[id(function)] = function
            self._hops[id(function)] = self._hop
            self._mention(function.__code__)

    def _mention(self, code: CodeType) -> None:
        found: Mentioned = mentioned(code)
        for name in found.names | found.words:
            self.names[name] = min(self._hop, self.names.get(name, self._hop))
        self.words |= found.words
        self._computed |= found.computes_names
        self._asked |= found.asked

    def _named(self, held: Iterable[str]) -> Iterator[str]:
        """Those of the names mentioned that something holds; functions found there are one call further away."""
        for name in sorted(self.names.keys() & held):
            self._hop = self.names[name] + 1
            yield name

    # what is written

    def _constant(self, value: Any) -> str:
        if value is None or value is True or value is False:
            return repr(value)
        name = f"c{id(value):x}"
        self.namespace[name] = value
        return name

    def _variable(self, at: str) -> str:
        if at.isidentifier():
            return at
        self._variables += 1
        self._lines.append(f"v{self._variables} = {at}")
        return f"v{self._variables}"

    def _demand(self, condition: str) -> None:
        self._lines.append(f"if not ({condition}): return False")

    def _demand_member(self, member: Any, at: str) -> None:
        if type(member) is Bypass:
            member = member.cached
        if isinstance(member, staticmethod | classmethod) and type(member.__func__) is Bypass:
            self._demand(f"{at}.__func__ is {self._constant(member.__func__.cached)}")
        else:
            self._demand(f"{at} is {self._constant(member)}")

    # what is found

    def _function(self, function: FunctionType) -> None:
        """What a function reads beside its arguments: globals, its closure, objects among its defaults."""
        self._hop = self._hops[id(function)]
        if not is_foreign(function.__module__):
            self._code_globals(function.__code__, function.__globals__)
        self._hop = self._hops[id(function)] + 1
        own = self._constant(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
            if name != "__class__":
                self._visit(content, f"{self._constant(cell)}.cell_contents", 1)
        for i, value in enumerate(function.__defaults__ or ()):
            if not isinstance(value, (*_SINGLE, *_PLAIN)):
                self._visit(value, f"{own}.__defaults__[{i}]", 1)
        for name in self._named(vars(function).keys()):
            self._visit(vars(function)[name], f"{own}.__dict__[{name!r}]", 1)

    def _code_globals(self, code: CodeType, held: dict[str, Any]) -> None:
        at, hop = self._constant(held), self._hop + 1
        for name in sorted(mentioned(code).names & held.keys()):
            if (id(held), name) not in self._globals:
                self._globals.add((id(held), name))
                self._hop = hop
                self._visit(held[name], f"{at}[{name!r}]", 1)

    def _visit(self, value: Any, at: str, depth: int) -> None:
        value = value.cached if type(value) is Bypass else value  # it is in its place for as long as this is traced
        kind = type(value)
        if isinstance(value, _SINGLE):
            self._demand(f"{at} is {self._constant(value)}")
        elif kind in _PLAIN or kind.__module__ == "numpy" and not hasattr(value, "__dict__"):
            self._plain(value, at)
        elif isinstance(value, Tensor):
            self._tensor(value, at)
        elif isinstance(value, _SKIPPED) or depth > _DEEP:
            pass
        elif id(value) in self._seen:
            self._demand(f"{at} is {self._seen[id(value)]}")
        elif isinstance(value, nn.Module):
            self._module(value, at, depth)
        elif isinstance(value, type | ModuleType | FunctionType | MethodType | BuiltinFunctionType) or kind is Cached:
            self._code(value, at, depth)
        elif isinstance(value, ContextVar):
            content = value.get(None)
            if isinstance(content, (*_SINGLE, *_PLAIN)):
                self._visit(content, f"{at}.get(None)", depth + 1)
        else:
            self._object(value, at, depth)

    def _plain(self, value: Any, at: str) -> None:
        if type(value).__name__ == "ndarray":
            if value.nbytes <= 4096:
                self._demand(f"{at}.tobytes() == {value.tobytes()!r}")
            return
        constant = self._constant(value)
        self._demand(f"(v := {at}) is {constant} or same(v, {constant})")

    def _tensor(self, value: Tensor, at: str) -> None:
        """That there is one: its numbers are read by the graph, what it is like may decide what the code does."""
        self._lines.append(f"v = {at}")
        self._demand("isinstance(v, Tensor)")
        looks = (("shape", _SHAPES), ("dtype", _TYPES), ("device", {"device", "is_cuda", "get_device"}))
        for name, words in looks:
            if not self.names.keys().isdisjoint(words):
                self._demand(f"v.{name} == {self._constant(getattr(value, name))}")

    def _code(self, value: Any, at: str, depth: int) -> None:
        if isinstance(value, MethodType):
            self._visit(value.__func__, f"{at}.__func__", depth + 1)
            self._visit(value.__self__, f"{at}.__self__", depth + 1)
            return
        if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | type | None):
            return  # a method of something that is looked at where it is held
        constant = self._constant(value)
        self._demand(f"{at} is {constant}")
        self._seen[id(value)] = constant
        for function in functions_in(value):
            self._follow(function)
        if isinstance(value, ModuleType):
            self._library(value, constant, depth)
        elif isinstance(value, type) and not is_foreign(value.__module__) and not issubclass(value, Enum):
            self._members(value, (), depth)
            if not issubclass(value, nn.Module):
                for name in _CALLED:
                    for function in functions_in((entry_of(value, name) or (None, None))[1]):
                        self._follow(function)

    def _library(self, module: ModuleType, at: str, depth: int) -> None:
        """A module of Python's: of torch's the functions alone, of its own library whatever is mentioned."""
        held = vars(module)
        torchs = module.__name__.partition(".")[0] == "torch"
        if is_foreign(module.__name__) and not torchs:
            return
        for name in self._named(held.keys()):
            value = held[name]
            if name.startswith("__") or torchs and not isinstance(value, FunctionType | ModuleType | BuiltinFunctionType):
                continue
            self._visit(value, f"{at}.__dict__[{name!r}]", depth + 1)

    def _members(self, cls: type, hidden: Iterable[str], depth: int) -> list[str]:
        """What a class and its bases hold of the names mentioned; returns those names."""
        found, of_class = {"forward", *hidden}, list[str]()
        for owner in owners(cls):
            torchs = is_foreign(owner.__module__)
            if torchs and not issubclass(owner, nn.Module):
                continue  # an object of Python's own
            held = vars(owner)
            for name in self._named(held.keys()):
                # a child's forward is its own affair; where the code calls one by name, it was seen to run
                if name in found or name.startswith("__"):
                    continue
                found.add(name)
                of_class.append(name)
                if not depth:
                    self._hop -= 1  # the methods of the module itself are as near as its forward
                at = f"{self._constant(held)}[{name!r}]"
                functions = list(functions_in(held[name]))
                for function in functions:
                    self._follow(function, whole=True)
                if functions:
                    if not torchs:
                        self._demand_member(held[name], at)
                else:
                    self._visit(held[name], at, depth + 1)
        return of_class

    def _module(self, module: nn.Module, at: str, depth: int) -> None:
        at = self._variable(at)
        self._seen[id(module)] = at
        held = vars(module)
        d = self._variable(f"{at}.__dict__")
        if "training" in self.names:
            self._demand(f"{d}['training'] is {held['training']}")
        if depth and not self.names.keys().isdisjoint(_KINDS):
            kind = self._constant(_kind_of(module))
            self._demand(f"type({at}) is {kind} or kind_of({at}) is {kind}")
        own = {name for name in held.keys() - _INTERNAL if not name.startswith("_revwire")}
        for name in sorted(own) if self._computed else self._named(own):
            self._visit(held[name], f"{d}[{name!r}]", depth + 1)
        stores: dict[str, Mapping[str, Any]] = {store: held[store] for store in _STORES}
        several = isinstance(module, _CONTAINERS)
        for store, content in stores.items():
            whole = several or (store == "_modules" and not self.names.keys().isdisjoint(_ALL_BELOW)) or self._computed
            wanted = list(content) if whole else list(self._named(content.keys()))
            if not wanted and not several:
                continue
            s = self._variable(f"{d}[{store!r}]")
            if whole:
                self._demand(f"[*{s}] == {list(content)!r}")
            for name in wanted:
                self._child(content[name], f"{s}[{name!r}]", depth)
        hidden = [*held, *(name for content in stores.values() for name in content)]
        of_class = self._members(type(module), hidden, depth)
        places = [d, *(f"{d}[{store!r}]" for store in _STORES)]
        self._lacks(of_class, places[:1])
        self._appears((*hidden, *of_class), places, type(module))

    def _child(self, value: Any, at: str, depth: int) -> None:
        """A child, parameter or buffer: whether there is one, and what of it is mentioned."""
        if not isinstance(value, nn.Module):
            self._visit(value, at, depth + 1)
            return
        if id(value) in self._seen or depth > _DEEP:
            self._demand(f"{at} is {self._seen.get(id(value), at)}")
            return
        lines, seen = len(self._lines), len(self._seen)
        self._module(value, at, depth + 1)
        if not any(line.startswith("if") for line in self._lines[lines:]):
            # nothing of it is mentioned but itself
            del self._lines[lines:]
            while len(self._seen) > seen:
                self._seen.popitem()
            self._demand(f"{at} is not None")

    def _appears(self, held: Iterable[str], places: list[str], cls: type) -> None:
        """Demand that what the code may ask for, and is not there, has not come."""
        if self._absent and (names := self._absent.difference(held, dir(cls))):
            classes = [owner for owner in owners(cls) if not is_foreign(owner.__module__)]
            self._lacks(names, places + [self._constant(vars(owner)) for owner in classes])

    def _lacks(self, names: Iterable[str], places: list[str]) -> None:
        """Demand that something holds none of these names."""
        if not (names := sorted(names)):
            return
        if len(names) < 3:
            self._demand(" and ".join(f"{name!r} not in {place}" for name in names for place in places))
        else:
            wanted = self._constant(frozenset(names))
            self._demand(" and ".join(f"{wanted}.isdisjoint({place})" for place in places))

    def _object(self, value: Any, at: str, depth: int) -> None:
        cls = type(value)
        at = self._variable(at)
        self._seen[id(value)] = at
        self._demand(f"type({at}) is {self._constant(cls)}")
        if id(value) in self._caches:
            return
        if isinstance(value, list | tuple | dict | set | frozenset):
            self._container(value, at, depth)
        if cls in {list, tuple, dict, set, frozenset} or is_foreign(cls.__module__) and not hasattr(value, "__dict__"):
            return
        own = not is_foreign(cls.__module__)
        if own:
            self._called(cls)
        held = getattr(value, "__dict__", {})
        held = self._caches.get(id(held), held)
        # a class that answers for other names than it holds is taken as a whole
        answers = any(entry_of(cls, name) for name in ("__getattr__", "__getattribute__"))
        if hasattr(value, "__dict__"):
            d = self._variable(f"{at}.__dict__")
            for name in sorted(held) if answers or self._computed else self._named(held.keys()):
                self._visit(held[name], f"{d}[{name!r}]", depth + 1)
        slots = {name for owner in cls.__mro__ for name in _slots(owner)}
        for name in self._named(slots):
            if hasattr(value, name):
                self._visit(getattr(value, name), f"{at}.{name}", depth + 1)
        if not own:
            if hasattr(value, "__dict__"):
                self._appears(held, [d], cls)
            return
        of_class = self._members(cls, [*held, *slots], depth + 1)
        if hasattr(value, "__dict__"):
            self._lacks(of_class, [d])
            self._appears((*held, *of_class), [d], cls)

    def _called(self, cls: type) -> None:
        """Follow what Python calls of an object by itself."""
        for owner in owners(cls):
            if not is_foreign(owner.__module__):
                for name, member in list(vars(owner).items()):
                    if name in _OPERATORS:
                        for function in functions_in(member):
                            self._follow(function)

    def _container(self, value: Any, at: str, depth: int) -> None:
        if isinstance(value, set | frozenset) or len(value) > _LONG:
            items = value.values() if isinstance(value, dict) else value
            plain = all(isinstance(item, (*_SINGLE, *_PLAIN)) for item in items)
            copy = type(value)(value) if plain and type(value) in {list, tuple, dict, set, frozenset} else None
            if copy is not None:
                self._demand(f"{at} == {self._constant(copy)}")
            else:
                self._demand(f"len({at}) == {len(value)}")
            return
        if isinstance(value, dict):
            if not all(isinstance(key, (*_SINGLE, *_PLAIN)) for key in value):
                self._demand(f"len({at}) == {len(value)}")
                return
            keys = list(value)
            self._demand(f"[*{at}] == {self._constant(keys)}")
            for key in keys:
                self._visit(dict.__getitem__(value, key), f"{at}[{self._constant(key)}]", depth + 1)
            return
        self._demand(f"len({at}) == {len(value)}")
        for i, item in enumerate(value):
            self._visit(item, f"{at}[{i}]", depth + 1)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _kind_of(module: nn.Module) -> type:
    """A module's class as its author made it."""
    cls = type(module)
    original: type = cls.__dict__.get("revwire_original", cls)
    return original
