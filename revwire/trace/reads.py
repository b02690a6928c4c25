"""What a frame's code reads beside its arguments: found by the names that it mentions, checked by code made of that.

Whatever the code may read, by any path from the module, a global or a closure, is noted as it is: plain values by
value, functions and classes by identity, objects and containers by what is in them. Not by their own identity, as a
deep copy of a model runs the same code. More is noted than the code reads (a name stands for every attribute of that
name), never less; what it costs is another trace where something changed that did not matter.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire.trace.code import entry_of, functions_in, is_foreign, mentioned
from revwire.trace.script import kind_of
from revwire.trace.values import DEEP, PLAIN, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import CodeType, FunctionType

_INTERNAL = {*nn.Module().__dict__, "training"}
_OURS = {
    "_revwire_program",
    "_revwire_plan",
    "_revwire_planned",
}  # put there by rewiring, after this is written
_STORES = ("_modules", "_parameters", "_buffers")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# how code goes on where an attribute is not there
_CATCHES = {"AttributeError", "Exception", "BaseException", "suppress"}
_KINDS = {"isinstance", "issubclass", "type", "__class__"}
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

_PASSES = 12  # each follows the names that the code found by the one before mentions


class Reads:
    """What the code of a module's frame reads, as it was when this was made.

    Args:
        module: The module.
        ran: Code that was seen to run: each code object with the globals that it looks names up in.
        below: Paths of children whose own forward counts too.
        caches: What tables, objects and globals held that the code fills (`Outside.filled`).

    Attributes:
        sees_training: Whether the code asks for the mode of a module.
    """

    def __init__(
        self,
        module: nn.Module,
        ran: Iterable[tuple[CodeType, dict[str, Any]]] = (),
        below: Iterable[str] = (),
        caches: Mapping[Any, Any] | None = None,
    ) -> None:
        walk = _Walk(module, tuple(ran), tuple(below), caches or {})
        self._source = walk.source()
        self.sees_training = "training" in walk.names
        self._namespace = walk.namespace
        self._check: Callable[[nn.Module], bool] | None = None

    def hold(self, module: nn.Module) -> bool:
        """Whether the code would read the same of this module (the one that was looked at, or a copy) and around it."""
        if self._check is None:
            exec(compile(self._source, "<revwire guards>", "exec"), self._namespace)  # noqa: S102 - written below
            self._check = self._namespace["check"]
        return self._check(module)


class _Walk(Values):
    """Follows what code mentions, and writes down a check of what it finds."""

    def __init__(
        self,
        module: nn.Module,
        ran: Iterable[tuple[CodeType, dict[str, Any]]],
        below: tuple[str, ...],
        caches: Mapping[Any, Any],
    ) -> None:
        super().__init__(caches)
        self._ran = [(code, held) for code, held in ran if not is_foreign(held.get("__name__"))]
        self._below = below
        for code, _ in ran:
            self.mention(code)
        for each in (module, *map(module.get_submodule, below)):
            for function in functions_in((entry_of(type(each), "forward") or (None, None))[1]):
                self.follow(function, whole=True)
        for _ in range(_PASSES):
            known = len(self.names), len(self.functions)
            self._pass(module)
            if known == (len(self.names), len(self.functions)):
                break

    def _pass(self, module: nn.Module) -> None:
        self.start()
        self._globals: set[tuple[int, str]] = set()
        self.absent = set(self.asked)
        if self.mentions(_CATCHES):
            self.absent |= self.names.keys()
        for name in sorted(self.names.keys() & _CONTEXTS.keys()):
            self.demand(f"same({self.constant(_CONTEXTS[name])}(), {self.constant(_CONTEXTS[name]())})")
        if not self.names.keys().isdisjoint({"environ", "getenv"}):
            for word in sorted(word for word in self.words if word.isupper()):
                self.demand(f"{self.constant(os.environ)}.get({word!r}) == {os.environ.get(word)!r}")
        self._root(module, "self")
        for path in self._below:
            at = "self" + "".join(f".__dict__['_modules'][{name!r}]" for name in path.split("."))
            self._root(module.get_submodule(path), at)
        for code, held in self._ran:
            self.hop = 0
            self.code_globals(code, held)
        done = 0
        while done < len(self.functions):  # more are found on the way
            self._function(list(self.functions.values())[done])
            done += 1

    def _root(self, module: nn.Module, at: str) -> None:
        """A module whose own forward is among the code."""
        if (entry := entry_of(type(module), "forward")) is not None:
            owner, member = entry
            self.demand(f"{self.constant(vars(owner))}['forward'] is {self.constant(member)}")
        if id(module) not in self.seen:
            self.module(module, at, 0)

    def _function(self, function: FunctionType) -> None:
        """What a function reads beside its arguments: globals, its closure, objects among its defaults."""
        self.hop = self.hops[id(function)]
        if not is_foreign(function.__module__):
            self.code_globals(function.__code__, function.__globals__)
        self.hop = self.hops[id(function)] + 1
        own = self.constant(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
            if name != "__class__":
                self.visit(content, f"{self.constant(cell)}.cell_contents", 1)
        for i, value in enumerate(function.__defaults__ or ()):
            if not isinstance(value, PLAIN):
                self.visit(value, f"{own}.__defaults__[{i}]", 1)
        for name in self.named(vars(function).keys()):
            self.visit(vars(function)[name], f"{own}.__dict__[{name!r}]", 1)

    def code_globals(self, code: CodeType, held: dict[str, Any]) -> None:
        at, hop = self.constant(held), self.hop + 1
        for name in sorted(mentioned(code).names & held.keys()):
            if (id(held), name) not in self._globals and (id(held), name) not in self.caches:
                self._globals.add((id(held), name))
                self.hop = hop
                self.visit(held[name], f"{at}[{name!r}]", 1)

    def module(self, module: nn.Module, at: str, depth: int) -> None:
        at = self.variable(at)
        self.seen[id(module)] = at
        if isinstance(module, torch.jit.ScriptModule):
            # an operation: its code is its own, and compiled
            self.demand(f"type({at}) is {self.constant(type(module))}")
            return
        held = vars(module)
        d = self.variable(f"{at}.__dict__")
        if "training" in self.names:
            self.demand(f"{d}['training'] is {module.training}")
        if depth and self.mentions(_KINDS):
            kind = self.constant(kind_of(module))
            self.demand(f"type({at}) is {kind} or kind_of({at}) is {kind}")
        own = {name for name in held.keys() - _INTERNAL if not name.startswith("_revwire")}
        for name in sorted(own) if self.computed else self.named(own):
            self.visit(held[name], f"{d}[{name!r}]", depth + 1)
        if self.computed:
            self.demand(f"{self.constant(own | _INTERNAL | _OURS)}.issuperset({d})")
        stores: dict[str, Mapping[str, Any]] = {store: held[store] for store in _STORES}
        several = isinstance(module, _CONTAINERS)
        for store, content in stores.items():
            whole = several or (store == "_modules" and self.mentions(_ALL_BELOW)) or self.computed
            wanted = list(content) if whole else list(self.named(content.keys()))
            if not wanted and not several:
                continue
            s = self.variable(f"{d}[{store!r}]")
            if whole:
                self.demand(f"[*{s}] == {list(content)!r}")
            for name in wanted:
                self._child(content[name], f"{s}[{name!r}]", depth)
        hidden = [*held, *(name for content in stores.values() for name in content)]
        of_class = self.members(type(module), hidden, depth)
        places = [d, *(f"{d}[{store!r}]" for store in _STORES)]
        self.lacks(of_class, places[:1])
        self.appears((*hidden, *of_class), places, type(module))

    def _child(self, value: Any, at: str, depth: int) -> None:
        """A child, parameter or buffer: whether there is one, and what of it is mentioned."""
        if not isinstance(value, nn.Module):
            self.visit(value, at, depth + 1)
            return
        if id(value) in self.seen or depth > DEEP:
            self.demand(f"{at} is {self.seen.get(id(value), at)}")
            return
        lines, seen = len(self.lines), len(self.seen)
        self.module(value, at, depth + 1)
        if not any(line.startswith("if") for line in self.lines[lines:]):
            # nothing of it is mentioned but itself
            self.forget(lines, seen)
            self.demand(f"{at} is not None")
