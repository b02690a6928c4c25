"""The code that may run in a frame: its functions, and the names and words that they mention."""

from __future__ import annotations

import dis
import functools
import opcode
import sys
import threading
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

Cached = type(functools.lru_cache(len))
"""What `functools.lru_cache` makes of a function."""

# code of these is not followed: it decides by its arguments, and nobody changes it in the midst of a program
_FOREIGN = {"torch", "functorch", "numpy", "sympy", "builtins", "revwire", *sys.stdlib_module_names}

_ASKS = {"getattr", "hasattr"}
_COMPUTES = {"vars", "__dict__", "dir", "attrgetter", "__getattribute__"}
_IDENTITY = {code for name, code in opcode.opmap.items() if name == "IS_OP" or name.endswith("_NONE")}
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
# the class made here may stand in front of the model's own
_WRITTEN_BY_TORCH = (nn.Module, object)


class Bypass:
    """In the place of a cached function: computes anew for the thread that looks, and is the cached one to others.

    Whoever notes what code reads while a model is looked at notes what this stands for (`cached`).
    """

    def __init__(self, cached: Any) -> None:
        self.cached = cached
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return (self.cached.__wrapped__ if self._is_mine() else self.cached)(*args, **kwargs)

    def _is_mine(self) -> bool:
        """Whether the thread that looks is the one that calls."""
        return threading.get_ident() == self._thread

    def __get__(self, instance: Any, owner: Any) -> Any:
        """A cached method, bound."""
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cached, name)


def is_foreign(module: str | None) -> bool:
    """Whether what a module of this name holds is Python's or torch's own, and no part of a model."""
    return module is not None and module.partition(".")[0] in _FOREIGN


def home(cls: type) -> str | None:
    """Name of the module that a class is of; None for one that `exec` made in a namespace without a name."""
    return None if cls.__module__ == "builtins" and cls.__flags__ & _MADE_IN_PYTHON else cls.__module__


@dataclass(frozen=True)
class Mentioned:
    """What a function's code mentions, functions inside of it included.

    Attributes:
        names: Names of attributes and globals.
        words: Strings that could be names.
        tests_identity: Whether it asks `is` of anything.
        computes_names: Whether it reads attributes whose names it does not mention.
        asked: Names that it asks for with `hasattr` or `getattr`: they may not be there.
    """

    names: frozenset[str]
    words: frozenset[str]
    tests_identity: bool
    computes_names: bool
    asked: frozenset[str]


_KNOWN: WeakKeyDictionary[CodeType, Mentioned] = WeakKeyDictionary()


def mentioned(code: CodeType) -> Mentioned:
    """What a function's code mentions."""
    if (known := _KNOWN.get(code)) is None:
        names, words, identity = set(code.co_names), set[str](), bool(_IDENTITY & set(code.co_code[::2]))
        computes, asked = not names.isdisjoint(_COMPUTES), set[str]()
        if not names.isdisjoint(_ASKS):
            for name in _asked(code):
                asked |= {name} if name else set()
                computes |= not name
        waiting = list(code.co_consts)
        while waiting:
            constant = waiting.pop()
            if isinstance(constant, str) and constant.isidentifier():
                words.add(constant)
            elif isinstance(constant, tuple | frozenset):
                waiting.extend(constant)
            elif isinstance(constant, CodeType):
                inner = mentioned(constant)
                names |= inner.names
                words |= inner.words
                identity |= inner.tests_identity
                computes |= inner.computes_names
                asked |= inner.asked
        known = _KNOWN[code] = Mentioned(
            frozenset(names), frozenset(words), identity, computes, frozenset(asked)
        )
    return known


def _asked(code: CodeType) -> Iterator[str | None]:
    """The literal names that `getattr` and `hasattr` of this code are given, None for each that is computed."""
    instructions = list(dis.get_instructions(code))
    for start, instruction in enumerate(instructions):
        if instruction.argval not in _ASKS or not instruction.opname.startswith("LOAD"):
            continue
        rest = instructions[start + 1 :]
        end = next(
            (i for i, each in enumerate(rest) if each.opname.startswith(("CALL", "PRECALL"))), len(rest)
        )
        given, count = rest[:end], rest[end].arg if end < len(rest) else None
        if count != sum(dis.stack_effect(each.opcode, each.arg) for each in given):
            yield None  # the call is one in its arguments, to make up the name or the object
            continue
        # the last is the name where there are two arguments, and the default where there are three
        following = [*given[1:], None][: len(given) - (count == 3)]
        yield next(
            (
                one.argval
                for one, after in zip(given, following, strict=False)
                if isinstance(one.argval, str)
                and one.opname.startswith("LOAD_CONST")
                and (after is None or after.opname.startswith("LOAD"))
            ),
            None,
        )


def functions_in(value: object) -> Iterator[FunctionType]:
    """The functions that run where an attribute of this value is read or called."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if isinstance(f, FunctionType))
    elif isinstance(value, staticmethod | classmethod | MethodType):
        yield from functions_in(value.__func__)
    elif isinstance(value, functools.cached_property | functools.partial | functools.partialmethod):
        yield from functions_in(value.__dict__.get("func") or getattr(value, "func", None))
    elif type(value) is Cached:
        yield from functions_in(value.__wrapped__)
    elif isinstance(value, Bypass):
        yield from functions_in(value.cached)


def owners(cls: type) -> list[type]:
    """The classes that a module's or an object's code stands in: not Python's, nor what revwire puts in front."""
    return [c for c in cls.__mro__ if c not in _WRITTEN_BY_TORCH and "revwire_original" not in vars(c)]


def entry_of(cls: type, name: str) -> tuple[type, Any] | None:
    """Where in its hierarchy a class has a member of this name, and that member."""
    return next(((owner, vars(owner)[name]) for owner in owners(cls) if name in vars(owner)), None)
