"""How a model is rewired and put back: its modules get subclasses of their own classes whose forward is rewired.

Swapping `module.__class__` (as FSDP2 does) leaves parameters, buffers, hooks, methods and `isinstance` as they are, and
makes going back exact: the old class is put back.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakValueDictionary

from torch import nn

from revwire.errors import RewireError
from revwire.find.probe import sources
from revwire.rewrite.program import Program
from revwire.rewrite.recomputed import Recomputed
from revwire.rewrite.wired import PLAN, PLANNED, PROGRAM, check_complete, is_wired
from revwire.run.streams import settle
from revwire.trace.frame import TraceFailure
from revwire.trace.patches import one_at_a_time

if TYPE_CHECKING:
    from revwire.find.probe import Probe
    from revwire.planning.plan import Plan, Step
    from revwire.run.options import Options

_Maker = TypeVar("_Maker", bound=Callable[[Any], type[nn.Module]])


def _once(make: _Maker) -> _Maker:
    """A maker of subclasses that makes one for each class, which lives as long as a module is of it.

    Held weakly, as a subclass holds its class: a class made for one model goes with the model.
    """
    made: WeakValueDictionary[int, type[nn.Module]] = WeakValueDictionary()

    @functools.wraps(make)
    def get(cls: Any) -> type[nn.Module]:
        if (known := made.get(id(cls))) is None:  # nothing else has this id while a subclass of it is there
            known = made[id(cls)] = make(cls)
        return known

    return cast("_Maker", get)


@one_at_a_time
def apply_plan(model: nn.Module, chosen: Plan, found: Probe, options: Options) -> None:
    """Give each planned module its program, then swap the classes: all of them or, on an error, none."""
    if any(map(is_wired, model.modules())):
        raise RewireError(f"{type(model).__name__} was rewired meanwhile, by another thread")
    wanted: dict[str, dict[int, Step]] = {run.module: {} for run in chosen.joined}
    for step in chosen.steps:
        own = wanted.setdefault(step.module, {})
        known = own.get(step.residual)
        own[step.residual] = step if known is None else replace(step, mode=known.mode)
    # a step that a shared module runs in the middle of a chain too takes, and hands on, both streams
    places = {
        "begins": _always(chosen, {id(chain.steps[0]) for chain in chosen.chains}),
        "ends": _always(chosen, {id(chain.steps[-1]) for chain in chosen.chains if not chain.open}),
        "cuts": _cut(chosen, found),
    }
    frames = {f.path: f for f in reversed(found.frames) if f.graph is not None}
    programs: dict[str, Program | Recomputed] = {p: Recomputed(p, options) for p in chosen.recomputed}
    for path, steps in wanted.items():
        if "forward" in frames[path].module.__dict__:
            raise RewireError(
                f"{path or '(model)'}: its forward was replaced on the object itself, which hides its class's; "
                "rewire before whatever replaced it, or exclude the module"
            )
        here = {place: frozenset(i for i in steps if (path, i) in each) for place, each in places.items()}
        try:
            joined = tuple(run for run in chosen.joined if run.module == path)
            programs[path] = Program(
                frames[path],
                steps,
                here["ends"],
                options,
                joined,
                begins=here["begins"],
                cuts=here["cuts"],
                trained=found.training.variants(path),
            )
        except TraceFailure as failure:
            raise RewireError(f"{path or '(model)'} cannot be rewired: its forward {failure}") from failure
    for path, program in programs.items():
        module = model.get_submodule(path)
        module.__dict__[PROGRAM] = program
        module.__class__ = _rewired_class(type(module))
    model.__dict__[PLAN], model.__dict__[PLANNED] = chosen, programs
    model.__class__ = _settling_class(type(model))


def _always(chosen: Plan, places: set[int]) -> set[tuple[str, int]]:
    """The module and residual of the steps that stand in such a place of their chain whenever they run."""
    elsewhere = {(step.module, step.residual) for step in chosen.steps if id(step) not in places}
    return {(step.module, step.residual) for step in chosen.steps} - elsewhere


def _cut(chosen: Plan, found: Probe) -> set[tuple[str, int]]:
    """The module and residual of the steps whose sum is cut in pieces and joined again before the next step."""
    return {
        (before.module, before.residual)
        for chain in chosen.chains
        for before, after in pairwise(chain.steps)
        if (residual := found.residual(after)) is not None
        and not found.origins.joined.isdisjoint(sources(residual.entering, found.origins))
    }


@_once
def _rewired_class(cls: Any) -> type[nn.Module]:
    """A subclass of `cls` whose forward runs the module's program."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program = self.__dict__.get(PROGRAM)
        # a forward that others hold on to (Accelerate's autocast wraps it) outlives its class on the module
        return cls.forward(self, *args, **kwargs) if program is None else program(self, args, kwargs)

    return _subclass(cls, {"forward": functools.wraps(cls.forward)(forward)})


@_once
def _settling_class(cls: Any) -> type[nn.Module]:
    """A subclass of the whole model's class: its methods hand out tensors, never streams."""
    methods = {
        name: _settling(method)
        for owner in reversed(cls.__mro__)
        if issubclass(owner, nn.Module) and owner is not nn.Module
        for name, method in vars(owner).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    return _subclass(cls, methods)


def _subclass(cls: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    original = getattr(cls, "revwire_original", cls)
    members |= {"revwire_original": original, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members["__reduce_ex__"] = _reduce
    return type(cls.__name__, (cls,), members)


def _reduce(self: nn.Module, _: Any) -> Any:
    """Pickle and deepcopy: the generated class is made anew from the one it was made of."""
    original = type(self).revwire_original  # type: ignore[attr-defined]
    getstate: Any = getattr(self, "__getstate__", None)
    state = getstate() if getstate is not None else self.__dict__
    return _rebuild, (original, PROGRAM in self.__dict__, PLAN in self.__dict__), state


def _rebuild(original: type[nn.Module], rewired: bool, whole: bool) -> nn.Module:
    cls = _rewired_class(original) if rewired else original
    cls = _settling_class(cls) if whole else cls
    return cls.__new__(cls)


_inside = threading.local()


def _settling(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, but what leaves its outermost call on a model is tensors, wherever its code stopped in a chain."""

    @functools.wraps(method)
    def settled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running: set[int] = _inside.__dict__.setdefault("models", set())
        if id(self) in running:
            return method(self, *args, **kwargs)
        if PLANNED in self.__dict__:
            check_complete(self)
        running.add(id(self))
        try:
            return settle(method(self, *args, **kwargs))
        finally:
            running.discard(id(self))

    return settled
