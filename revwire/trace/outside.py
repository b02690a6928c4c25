"""What outlives a call outside of a model, and its code fills: caches of functions, tables, globals.

While a model is looked at it computes with values that hold no numbers. Kept by `lru_cache`, in a table of its module
or of a library (einops keeps what it works out for each shape), they would be found by the next real run, and taken
for real. So cached functions compute anew for the thread that looks, and tables and globals are put back.
"""

from __future__ import annotations

import dis
import functools
from collections import deque
from contextlib import contextmanager
from enum import Enum
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire._torch import scripts_as_written
from revwire.pytree import is_object, tree_leaves
from revwire.trace.code import Bypass, Cached, functions_in, home, is_foreign, mentioned, owners
from revwire.trace.proxy import ValueProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import CodeType

_FEW = 16  # of larger tables the tables in them are a library's lists of things
_MOST = 3000  # functions followed: as a library's reach each other, all of them would be


class Outside:
    """What the code of a model's forwards reaches outside of the model.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._functions: dict[int, FunctionType] = {}
        self._classes: dict[int, set[str]] = {}
        self._places: list[tuple[Callable[[Any], None], Any]] = []
        self._kept: list[tuple[str, Any, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []
        for module in root.modules():
            self._class(type(module), {"forward"})
            for key, value in list(vars(module).items()):
                if type(value) is Cached or isinstance(value, FunctionType | functools.partial):
                    self._found(value, key, functools.partial(vars(module).__setitem__, key))
                elif is_object(value) and not _is_table(value) and id(value) not in self._seen:
                    # not one of the module's own attributes, which are put back one by one
                    self._seen.add(id(value))
                    self._kept.append((f"{type(value).__name__} {key}", vars(value), dict(vars(value))))
        done = 0
        while done < len(self._functions) < _MOST:
            self._function(list(self._functions.values())[done])
            done += 1

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """For the length of the block caches are passed by; at its end all is as it was."""
        undo: list[Callable[[], None]] = []
        try:
            for put, value in self._places:
                undo.append(functools.partial(put, value))
                put(_bypassed(value))
            yield
        finally:
            for put_back in reversed(undo):
                put_back()
            self.put_back()

    def put_back(self) -> None:
        """Take what was put into tables and globals since this was made out of them again."""
        for _, table, was in self._kept:
            if not _is_as_it_was(table, was):
                _restore(table, was)
        for held, name, value in self._globals:
            if held.get(name, self) is not value:
                held[name] = value

    def hide_stand_ins(self) -> list[Callable[[], None]]:
        """Take out what holds a stand-in of another frame: to the next one it would be a tensor of an earlier call.

        Returns:
            What puts it back, for when that frame's code goes on.
        """
        undo: list[Callable[[], None]] = []
        for _, table, was in self._kept:
            if _is_as_it_was(table, was):
                continue
            if isinstance(table, dict):
                hidden = {k: v for k, v in dict.items(table) if _holds_stand_in((k, v))}
                if hidden:
                    _restore(
                        table, {k: v for k, v in dict.items(table) if k not in hidden} | _only(was, hidden)
                    )
                    undo.append(functools.partial(dict.update, table, hidden))
            elif _holds_stand_in(list(table)):
                undo.append(functools.partial(_restore, table, type(table)(table)))
                _restore(table, was)
        for held, name, value in self._globals:
            if _holds_stand_in(held.get(name)):
                undo.append(functools.partial(held.__setitem__, name, held[name]))
                held[name] = value
        return undo

    def filled(self) -> dict[Any, Any]:
        """What tables held that hold something new, by id, and globals that were None, by the id of theirs and name.

        They are caches, which say nothing of what code will do.
        """
        tables = {id(table): was for _, table, was in self._kept if not _is_as_it_was(table, was)}
        values = {(id(held), name): v for held, name, v in self._globals if held.get(name, self) is not v}
        return {**tables, **values}

    def changed(self) -> frozenset[tuple[str, tuple[int, ...]]]:
        """What was changed, and not only filled: tables by another value or less, globals that had one.

        Returns:
            Names, each with what tells this change from another.
        """
        changed = [
            (name, list(dict.values(table)) if isinstance(table, dict) else list(table))
            for name, table, was in self._kept
            if not _is_as_it_was(table, was) and not _is_filled(table, was)
        ]
        changed += [
            (name, [held.get(name)])
            for held, name, value in self._globals
            if value is not None and held.get(name, self) is not value
        ]
        self._alive += changed  # nothing else may come to have the id of one of these
        return frozenset((name, tuple(map(id, values))) for name, values in changed)

    def _class(self, cls: type, names: set[str]) -> None:
        """Follow those of a class's methods, and those that they mention; its tables too."""
        known = self._classes.setdefault(id(cls), set())
        names = names - known
        known |= names
        for owner in owners(cls):
            if is_foreign(home(owner)):
                continue
            for name in names & vars(owner).keys():
                member = vars(owner)[name]
                self._found(member, name, functools.partial(setattr, owner, name))
                for function in functions_in(member):
                    said = mentioned(function.__code__)
                    self._class(cls, {*said.names, *said.words})

    def _found(self, value: Any, name: str, put: Callable[[Any], None] | None) -> None:
        """Something that code mentions; `put` puts another thing in its place."""
        inner = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        passed_by = type(inner) is Cached and not is_foreign(getattr(inner, "__module__", None))
        if (passed_by or isinstance(inner, torch.jit.ScriptFunction)) and put is not None:
            self._places.append((put, value))
        for function in functions_in(value):
            if not is_foreign(function.__module__):
                self._functions.setdefault(id(function), function)
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._look_into(value, name)

    def _look_into(self, value: Any, name: str) -> None:
        if _is_table(value):
            was = dict(dict.items(value)) if isinstance(value, dict) else type(value)(value)
            self._kept.append((name, value, was))
            inner = was.values() if isinstance(was, dict) else was
            for item in list(inner) if len(was) <= _FEW else ():
                if _is_table(item):
                    self._found(item, name, None)
        elif isinstance(value, ModuleType | nn.Module):
            return
        elif isinstance(value, type):
            if not is_foreign(home(value)) and not issubclass(value, nn.Module | Enum):
                self._class(value, {n for owner in owners(value) for n in vars(owner)})
        elif not is_foreign(home(type(value))) and not isinstance(value, Enum):
            for key, held in list(getattr(value, "__dict__", {}).items()):
                if _is_table(held) or type(held) is Cached:
                    self._found(held, key, functools.partial(vars(value).__setitem__, key))
            self._class(type(value), {n for owner in owners(type(value)) for n in vars(owner)})

    def _function(self, function: FunctionType) -> None:
        held, said = function.__globals__, mentioned(function.__code__)
        for name in said.names & held.keys():
            value = held[name]
            self._found(value, name, functools.partial(held.__setitem__, name))
            if isinstance(value, ModuleType) and not is_foreign(value.__name__):
                self._library(value, said.names, 0)
        for name in _stored(function.__code__) & held.keys():
            self._globals.append((held, name, held[name]))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
            if name != "__class__":
                self._found(content, name, functools.partial(setattr, cell, "cell_contents"))
        for name, value in [*vars(function).items(), *(("default", d) for d in function.__defaults__ or ())]:
            if _is_table(value):
                self._found(value, name, None)

    def _library(self, module: ModuleType, names: Iterable[str], depth: int) -> None:
        """What code mentions of a Python module, `library.part.function` included."""
        held = vars(module)
        for name in held.keys() & set(names):
            self._found(held[name], name, functools.partial(held.__setitem__, name))
            if isinstance(held[name], ModuleType) and not is_foreign(held[name].__name__) and depth < 4:
                self._library(held[name], names, depth + 1)


def _bypassed(value: Any) -> Any:
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_bypassed(value.__func__))
    return _Scripted(value) if isinstance(value, torch.jit.ScriptFunction) else Bypass(value)


class _Scripted(Bypass):
    """In the place of a script function: an operation of the frame that calls it."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)

        # generated code knows functions by name, and would call the class of script functions
        def scripted(*args: Any, **kwargs: Any) -> Any:
            with scripts_as_written():
                return function(*args, **kwargs)

        self._operation = scripted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it returns; what stands in for it where it is given what stands in for tensors."""
        given = (leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is ValueProxy)
        if self._is_mine() and (proxy := next(given, None)) is not None:
            return proxy.tracer.create_proxy("call_function", self._operation, args, kwargs)
        return self.cached(*args, **kwargs)


@functools.lru_cache(maxsize=4096)
def _stored(code: CodeType) -> frozenset[str]:
    """The globals that a function's code sets."""
    return frozenset(
        str(each.argval)
        for each in dis.get_instructions(code)
        if each.opname in {"STORE_GLOBAL", "DELETE_GLOBAL"}
    )


def _holds_stand_in(value: object) -> bool:
    kind = type(value)
    if kind in {tuple, list, set}:
        return any(map(_holds_stand_in, value))  # type: ignore[call-overload]
    if kind is dict:
        return any(map(_holds_stand_in, [*value, *value.values()]))  # type: ignore[misc, attr-defined]
    return kind is ValueProxy


def _only(was: dict[Any, Any], keys: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v for k, v in was.items() if k in keys}


def _is_table(value: object) -> bool:
    """Whether a value is a container that can be put back without asking it: what overrides less is left alone."""
    return isinstance(value, dict) or type(value) in {list, set, deque}


# of dicts, what their own class has in the place of these methods is not asked
def _holds(table: dict[Any, Any], was: dict[Any, Any]) -> bool:
    return all(dict.get(table, key, table) is value for key, value in was.items())


def _is_as_it_was(table: Any, was: Any) -> bool:
    if isinstance(table, dict):
        return dict.__len__(table) == len(was) and _holds(table, was)
    if isinstance(table, set):
        return bool(table == was)
    return len(table) == len(was) and all(a is b for a, b in zip(table, was, strict=True))


def _is_filled(table: Any, was: Any) -> bool:
    """Whether all that a table held is in it still, and new keys beside: a cache."""
    if isinstance(table, dict):
        return _holds(table, was)
    return isinstance(table, set) and bool(table >= was)


def _restore(table: Any, was: Any) -> None:
    if isinstance(table, dict):
        for key in dict.keys(table) - was.keys():
            dict.__delitem__(table, key)
        dict.update(table, was)
    elif isinstance(table, list):
        table[:] = was
    elif isinstance(table, set):
        table &= was
        table |= was
    else:
        table.clear()
        table.extend(was)
