"""How a model is rewired and put back: its modules get subclasses of their own classes whose forward is rewired.

Swapping `module.__class__` (as FSDP2 does) leaves parameters, buffers, hooks, methods and `isinstance` as they are, and
makes going back exact: the old class is put back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn

from revwire import libraries
from revwire.errors import RewireError
from revwire.find.probe import Probe, make_plan, probe
from revwire.planning.dials import Globs, check_dials, globs_of
from revwire.planning.transitions import Recomputed
from revwire.rewrite.program import PROGRAM, Options, Planned, Program
from revwire.run.branch import Cut
from revwire.run.coupling import Coupling, coupling_of
from revwire.run.exact import Exact, Grid, exact_of
from revwire.run.streams import settle
from revwire.trace.frame import TraceFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.planning.plan import Plan

_Maker = TypeVar("_Maker", bound=Callable[..., Any])
_once = cast("Callable[[_Maker], _Maker]", functools.cache)  # classes are hashable, whatever their stubs say

FLOAT32_ROUNDING = 2.0**-24
MOST_NOISE = 1e-3
"""The relative gradient error that a plan warns of. Measured: noise^steps * 2^-24 predicts it within a factor of two
(momentum and BDIA at 1/2, 12 steps: 2.4e-4 predicted, 2.8e-4 and 3.2e-4 found)."""

_PLAN = "_revwire_plan"


def unwire(model: nn.Module) -> nn.Module:
    """Put a rewired model back: the same classes, the same code, the parameters as they are now.

    Raises:
        RewireError: the model is not rewired, or the class of one of its modules was replaced since (FSDP2,
            parametrizations).
    """
    for module in _wired(model, "so there is nothing to undo"):
        _take_off(module)
    return model


@contextmanager
def unwired(model: nn.Module) -> Iterator[nn.Module]:
    """For the length of the block, a rewired model is the network it was: what runs in between is the original.

    For tools that look at what every module returns and know nothing but tensors (torchinfo, torchview), and to compare
    with the original network on the weights of now. A backward of what ran before the block may run within it.

    Raises:
        RewireError: as `unwire`.
    """
    taken = [
        (module, type(module), _take_off(module)) for module in _wired(model, "so it is the network it was")
    ]
    try:
        yield model
    finally:
        for module, cls, own in taken:
            module.__class__ = cls
            module.__dict__.update(own)


def _wired(model: nn.Module, otherwise: str) -> list[nn.Module]:
    """The modules whose classes were made here."""
    wired = [(path, module) for path, module in model.named_modules() if is_wired(module)]
    if not wired:
        raise RewireError(f"{type(model).__name__} is not rewired, {otherwise}")
    for path, module in wired:
        if "revwire_original" not in vars(type(module)):
            raise RewireError(
                f"{path or '(model)'}: since it was rewired its class was replaced by {type(module).__name__}, as "
                "fully_shard and parametrizations do; undo that first, or unwire before it"
            )
    return [module for _, module in wired]


def _take_off(module: nn.Module) -> dict[str, Any]:
    """Put a module's class back; returns the attributes that the class made here went by."""
    module.__class__ = cast("Any", type(module)).revwire_original
    return {name: module.__dict__.pop(name) for name in (PROGRAM, _PLAN) if name in module.__dict__}


def is_wired(module: nn.Module) -> bool:
    """Whether a module's class was made here."""
    return hasattr(type(module), "revwire_original")


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model was rewired by, None if it is not rewired."""
    return model.__dict__.get(_PLAN)


def options_of(model: nn.Module) -> Options | None:
    """How the steps of a rewired model run, None if it is not rewired."""
    return next((m.__dict__[PROGRAM].options for m in model.modules() if PROGRAM in m.__dict__), None)


def with_options(model: nn.Module, options: Options) -> nn.Module:
    """A deep copy of a rewired model whose steps run another way."""
    duplicate = copy.deepcopy(model)
    for module in duplicate.modules():
        if (program := module.__dict__.get(PROGRAM)) is not None:
            program.options = options
    return duplicate


def set_coupling(model: nn.Module, coupling: Coupling) -> None:
    """Have the next forward of a rewired model run another recurrence; one in flight keeps its own."""
    for module in model.modules():
        if (program := module.__dict__.get(PROGRAM)) is not None:
            program.options = replace(program.options, coupling=coupling)


@dataclass(frozen=True)
class Recording:
    """One recorded run of a model, from which the model, or copies of it, are rewired with any dials.

    Attributes:
        found: The run.
        fresh: The chains chosen from it, no dial turned.
        options: How their steps will run.
    """

    found: Probe
    fresh: Plan
    options: Options

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        coupling: str | Coupling = "re2tal",
        exact: bool | int | Grid = False,
        include: Globs = None,
        exclude: Globs = None,
    ) -> Recording:
        """Run `model` once on fake tensors, and choose; the arguments are those of `revwire.rewire`.

        Raises:
            RewireError: the model is rewired already, does not run on the inputs, or the inputs are not known.
        """
        if any(map(is_wired, model.modules())):
            raise RewireError(f"{type(model).__name__} is rewired already; call revwire.unwire(model) first")
        kind = coupling_of(coupling)
        streams = exact_of(exact, kind)
        args, kwargs = call_arguments(model, example_inputs)
        found = probe(model, args, kwargs)
        fresh = choose_plan(found, kind, streams, include, exclude)
        return cls(found, fresh, Options(kind, exact=streams))

    def rewire(
        self, model: nn.Module, chosen: Plan, *, compiled: bool = False, overlap: bool = False
    ) -> nn.Module:
        """Rewire the model that was recorded, or a copy of it as it was then; returns it.

        Args:
            model: That one.
            chosen: What to rewire of it.
            compiled: Have torch.compile run the branches.
            overlap: Have second runs start beside the gradients of the step after theirs.

        Raises:
            RewireError: there is nothing to rewire, or a module of it cannot be.
        """
        if not chosen.chains:
            raise RewireError(nothing_to_rewire(chosen))
        apply_plan(model, chosen, self.found, replace(self.options, compile=compiled, overlap=overlap))
        return model


def choose_plan(
    found: Probe, coupling: Coupling, exact: Exact = False, include: Globs = None, exclude: Globs = None
) -> Plan:
    """The chains to rewire of a recorded run."""
    blocks = coupling.keeps_function
    chosen = make_plan(found, coupling.spec, globs_of(include), globs_of(exclude) or (), blocks=blocks)
    bits = exact.bits if isinstance(exact, Grid) else exact
    return replace(chosen, exact=bits, warnings=_warnings(chosen, coupling, exact))


def _warnings(chosen: Plan, coupling: Coupling, exact: Exact) -> tuple[str, ...]:
    """What the coupling will not do well on these chains."""
    if not coupling.a:
        return (f"{coupling.spec} is the network as it was: not reversible, so it saves no memory",)
    if exact is not False or coupling.noise == 1:
        return ()
    told = []
    for chain in chosen.chains:
        steps = len(chain.steps)
        error = coupling.error_after(steps, FLOAT32_ROUNDING)
        if error > MOST_NOISE:
            told.append(
                f"{chain.name}: the inverse of {coupling.spec} amplifies rounding errors {coupling.noise:.3g} times a "
                f"step; over {steps} steps gradients of float32 streams would be wrong by about {error:.0e} of "
                f"their size; use exact=True, or at most {_carried(coupling)} steps a chain (exclude=)"
            )
    return tuple(told)


def _carried(coupling: Coupling) -> int:
    """How many steps of a chain float32 carries."""
    return int(math.log(MOST_NOISE / FLOAT32_ROUNDING) / math.log(coupling.noise))


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call `model` with: the example inputs as `(args, kwargs)`, its library's where there are none.

    Raises:
        RewireError: there are none, and the model does not know its own.
    """
    if example_inputs is None:
        example_inputs = libraries.example_inputs(model)
        if example_inputs is None:
            raise RewireError(
                f"what does {type(model).__name__} take? Pass example_inputs: a tensor, a tuple of arguments, or a "
                "dict of keyword arguments, such as torch.zeros(2, 3, 224, 224)"
            )
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise RewireError(
        f"example_inputs must be a tensor, a tuple or a dict, not {type(example_inputs).__name__}"
    )


def fitting(wanted: Plan, fresh: Plan, found: Probe) -> Plan:
    """The wanted plan, if this model has its residuals.

    Raises:
        RewireError: it has not; the message names the first step that is missing.
    """
    for step in wanted.steps:
        if found.residual(step) is None:
            raise RewireError(
                f"the plan does not fit {fresh.model}: it has no residual {step.name}; "
                "plan again with revwire.plan(model)"
            )
    check_dials(wanted, found)
    if wanted.coupling != fresh.coupling:
        raise RewireError(
            f"the plan was made for coupling {wanted.coupling!r}, not {fresh.coupling!r}; "
            f"pass coupling={wanted.coupling!r}"
        )
    if (type(wanted.exact), wanted.exact) != (
        type(fresh.exact),
        fresh.exact,
    ):  # True == 1, but is another grid
        raise RewireError(
            f"the plan was made for exact={wanted.exact}, not {fresh.exact}; pass exact={wanted.exact}"
        )
    return wanted


def nothing_to_rewire(empty: Plan) -> str:
    """The words for a plan without chains: the first reasons it gives."""
    reasons = "; ".join(f"{s.module or '(model)'}: {s.reason}" for s in empty.skipped[:3])
    more = (
        f" (and {len(empty.skipped) - 3} more: print(revwire.plan(model)))" if len(empty.skipped) > 3 else ""
    )
    return (
        f"{empty.model} has no two residual blocks in a row on one trunk, so nothing of it can be made reversible"
        + (f": {reasons}{more}" if reasons else "; it has no residual additions")
    )


def apply_plan(model: nn.Module, chosen: Plan, found: Probe, options: Options) -> None:
    """Give each planned module its program, then swap the classes: all of them or, on an error, none."""
    last = {id(chain.steps[-1]) for chain in chosen.chains if not chain.open}
    wanted: dict[str, dict[int, Planned]] = {run.module: {} for run in chosen.joined}
    for step in chosen.steps:
        frame_steps = wanted.setdefault(step.module, {})
        known = frame_steps.get(step.residual)
        # a step that a shared module runs in the middle of a chain too always hands on both streams
        ends = id(step) in last and (known is None or known.last)
        cuts = step.slices > 1 and step.slice_dim >= 0
        cut = Cut(step.slice_dim, step.slices, step.sliced_sides) if cuts else None
        parts = step.slices if step.inside else 1
        mode = step.mode if known is None else known.mode
        frame_steps[step.residual] = Planned(step.name, ends, step.post, mode, cut, parts)
    frames = {f.path: f for f in reversed(found.frames) if f.graph is not None}
    programs: dict[str, Program | Recomputed] = {p: Recomputed(p, options) for p in chosen.recomputed}
    for path, steps in wanted.items():
        if "forward" in frames[path].module.__dict__:
            raise RewireError(
                f"{path or '(model)'}: its forward was replaced on the object itself, which hides its class's; "
                "rewire before whatever replaced it, or exclude the module"
            )
        try:
            joined = tuple(run for run in chosen.joined if run.module == path)
            programs[path] = Program(frames[path], steps, options, joined)
        except TraceFailure as failure:
            raise RewireError(f"{path or '(model)'} cannot be rewired: its forward {failure}") from failure
    for path, program in programs.items():
        module = model.get_submodule(path)
        module.__dict__[PROGRAM] = program
        module.__class__ = _rewired_class(type(module))
    model.__dict__[_PLAN] = chosen
    model.__class__ = _settling_class(type(model))


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
    return _rebuild, (original, PROGRAM in self.__dict__, _PLAN in self.__dict__), state


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
        running.add(id(self))
        try:
            return settle(method(self, *args, **kwargs))
        finally:
            running.discard(id(self))

    return settled
