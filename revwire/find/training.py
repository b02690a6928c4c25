"""The model recorded once more, in train mode: which of its residuals are the same steps there, and why others are not.

What is planned in eval mode runs in training too, and has to be one function with it. So a residual becomes a step only
if training runs the same sum, with the same operations after it; and two of them follow each other on one trunk only if
they do in both modes. Traced are the frames that hold residuals; what their branches call runs once for each kind.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from revwire._torch import AnyBatchNorm, DataDependentOutputException
from revwire.find.additions import find_residuals
from revwire.find.blocks import find_blocks
from revwire.find.repeated import Repeated
from revwire.libraries.drop import drops
from revwire.pytree import tree_unflatten
from revwire.trace.frame import Frame, Identity, TraceFailure, first_line, original_forward
from revwire.trace.recorder import Recorder
from revwire.trace.same import same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import fx, nn

    from revwire.find.residual import Residual

_LEAVE_OUT = "so it is left as it is in both modes"


@dataclass(frozen=True)
class Training:
    """What a run in train mode recorded.

    Attributes:
        frames: The calls of each module that holds residuals, by its path.
        alone: The same of modules that this run did not call, traced on what evaluation gave them.
        origins: Which tensor each rearranged tensor came from.
        failure: Why the model itself does not run in train mode on these inputs, if it does not.
    """

    frames: dict[str, list[Frame]] = field(default_factory=dict)
    alone: dict[str, list[Frame]] = field(default_factory=dict)
    origins: dict[Identity, Identity] = field(default_factory=dict)
    failure: str | None = None

    def refuses(self, residual: Residual) -> str | None:
        """Why a residual, found in eval mode, is another step in training; None if it is the same."""
        path = residual.frame.path
        for frame in (*self.frames.get(path, ()), *self.alone.get(path, ())):
            if frame.graph is None:
                return f"in training its forward {frame.failure}, {_LEAVE_OUT}; {_advice(str(frame.failure))}"
            if (why := self._differs(residual, frame)) is not None:
                return f"in training {why}, {_LEAVE_OUT}; have both modes run the same sum, or exclude the module"
        return None

    def trained(self, residual: Residual) -> Residual | None:
        """A residual as training runs it, on the same side inputs; None where that was not recorded."""
        path = residual.frame.path
        for frame in (*self.frames.get(path, ()), *self.alone.get(path, ())):
            if frame.graph is not None and (found := self._same(residual, frame)) is not None:
                moved = found.with_post(residual.post_name) or found
                if len(moved.sides) == len(residual.sides):
                    return moved
        return None

    def parts(self, before: Residual, after: Residual) -> bool:
        """Whether training, where it runs both, does something to the trunk between two residuals."""
        left = {twin.leaving for twin in self._calls(before)}
        entering = [twin.entering for twin in self._calls(after)]
        return bool(left and entering) and not any(
            left.intersection(_sources(at, self.origins)) for at in entering
        )

    def variants(self, path: str) -> Iterator[Frame]:
        """The frames of a module whose code can see that it trains."""
        for frame in (*self.frames.get(path, ()), *self.alone.get(path, ())):
            reads = frame.guards.reads
            if frame.graph is not None and reads is not None and reads.sees_training:
                yield frame

    def _calls(self, residual: Residual) -> Iterator[Residual]:
        for frame in self.frames.get(residual.frame.path, ()):
            if frame.graph is not None and (twin := self._same(residual, frame)) is not None:
                yield twin.with_post(residual.post_name) or twin

    def _same(self, residual: Residual, frame: Frame) -> Residual | None:
        found = self._residuals[id(frame)]
        return next((r for r in found if (r.index, r.block) == (residual.index, residual.block)), None)

    @cached_property
    def _residuals(self) -> dict[int, list[Residual]]:
        every = (f for calls in (self.frames, self.alone) for frames in calls.values() for f in frames)
        return {id(f): find_residuals(f)[0] or find_blocks(f) for f in every if f.graph is not None}

    def _differs(self, residual: Residual, frame: Frame) -> str | None:
        twin, where = self._same(residual, frame), f"the residual at {residual.line}"
        if twin is None or twin.line != residual.line:
            return f"{where} is not there" + (f": it adds at {twin.line} instead" if twin else "")
        if twin.refused:
            return twin.refused
        if (moved := twin.with_post(residual.post_name)) is None:
            return f"{where} has no {residual.post_name} after the sum"
        if (twin.scale is None) != (residual.scale is None) or twin.parallel != residual.parallel:
            return f"{where} adds something else up"
        called, planned = _lasting(moved), _lasting(residual.with_post(residual.post_name) or residual)
        if called != planned:
            return f"{where} calls {', '.join(called) or 'no child'}, not {', '.join(planned) or 'none'}"
        # a mask that a run on real numbers leaves out is another call, no other mode
        if _called_alike(frame, residual.frame) and len(moved.sides) != len(residual.sides):
            return f"{where} has a branch that reads other values of its frame"
        return None


def _called_alike(one: Frame, other: Frame) -> bool:
    """Whether two calls have the same structure of arguments, with tensors in the same places."""
    if one.guards.spec != other.guards.spec or len(one.guards.constants) != len(other.guards.constants):
        return False
    return all(map(same, one.guards.constants, other.guards.constants))


def _lasting(residual: Residual) -> tuple[str, ...]:
    """The children that a branch calls, but for those that only drop: they are not there at a rate of zero."""
    module = residual.frame.module
    return tuple(sorted(path for path in residual.modules if not drops(module.get_submodule(path))))


def _advice(failure: str) -> str:
    if "numbers" in failure:
        return "decide around the block, or turn it off (layerdrop=0)"
    return "have training run the code that evaluation runs"


def _sources(value: Identity, origins: dict[Identity, Identity]) -> Iterator[Identity]:
    at: Identity | None = value
    while at is not None:
        yield at
        at = origins.get(at)


class _NeedsNumbers(BaseException):
    """Fake tensors will not do: no handler for errors of the model's own may take it for one."""


class _TrainingRecorder(Recorder):
    """Traces the frames that hold residuals; what they call and is no such frame just runs, once for each kind."""

    def __init__(
        self, evaluated: Recorder, wanted: set[str], modes: dict[nn.Module, bool], *, real: bool
    ) -> None:
        super().__init__(evaluated.root, real=real, modes=modes)
        self._inline = {
            id(f.module.get_submodule(path)) for f in evaluated.frames for path in f.guards.inlined
        }
        self._unread = evaluated._unread  # noqa: SLF001 - of this class
        if not real:
            self.fake = evaluated.fake or self.fake
        self._wanted = {id(evaluated.root.get_submodule(path)) for path in wanted}
        around = {path[:end] for path in wanted for end in _ends(path)}
        self._around = {id(evaluated.root.get_submodule(path)) for path in around}
        self._repeated = Repeated(self.origins)

    def _run(self, module: nn.Module, args: Any, kwargs: Any, caller: fx.Node | None) -> Any:
        if id(module) in self._wanted:
            return super()._run(module, args, kwargs, caller)
        with self.unobserved(), self.blamed_on_children():
            forward: Callable[..., Any] = original_forward(module)
            if self.fake is None or id(module) in self._around:
                return forward(*args, **kwargs)
            return self._repeated.run(module, forward, args, kwargs)

    def trace(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        """As `Recorder.trace`; what it raises names the line."""
        try:
            return super().trace(frame, args, kwargs)
        except DataDependentOutputException as error:
            if self.fake is None:
                raise
            raise _NeedsNumbers from error
        except TraceFailure as failure:
            raise TraceFailure(f"{failure} ({line_of(failure, frame.module)})") from failure
        except Exception as error:
            where = line_of(error, frame.module)
            said = f"{type(error).__name__}: {first_line(error)}"
            raise TraceFailure(f"cannot be traced: {said} ({where})") from error

    def alone(self, evaluated: Frame) -> Frame:
        """A frame that did not run in train mode, traced on what it was given in eval mode."""
        assert evaluated.graph is not None
        assert evaluated.guards.spec is not None
        frame = Frame(evaluated.path, evaluated.module)
        leaves = list(evaluated.guards.constants)
        for node in evaluated.graph.nodes:
            if node.op == "placeholder":
                leaves[int(str(node.target)[len("input_") :])] = node.meta["value"]
        args, kwargs = tree_unflatten(leaves, evaluated.guards.spec)
        nested, self._nested = self._nested, False
        try:
            self.trace(frame, args, kwargs)
        except TraceFailure as failure:
            frame.graph, frame.failure = None, str(failure)
        except _NeedsNumbers:
            frame.graph, frame.failure = None, "decides by the numbers in a tensor"
        finally:
            self._nested = nested
            self.tracing = self._calling = None
        return frame


def _ends(path: str) -> Iterator[int]:
    """Where the paths of the modules around a module end in its own."""
    yield 0
    yield from (i for i, letter in enumerate(path) if letter == ".")


def line_of(error: BaseException, module: nn.Module) -> str:
    """`file.py:123` of the innermost line of a module's own file that an error came through, else of its forward."""
    file = getattr(sys.modules.get(type(module).__module__), "__file__", None)
    code = getattr(type(module).forward, "__code__", None)
    number = 0 if code is None else code.co_firstlineno
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            number = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"{str(file or type(module).__name__).rpartition('/')[2]}:{number}"


def record_training(
    evaluated: Recorder, wanted: dict[str, Frame], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Training:
    """Run a model that was recorded in eval mode once more in train mode; it keeps its modes and everything else.

    On fake tensors, or, where those did not do or do not now, on real ones.

    Args:
        evaluated: The run in eval mode.
        wanted: The modules that hold residuals, by their path, each with the frame of one of its calls.
        args: What the model is called with.
        kwargs: The same, by name.
    """
    modules = list(evaluated.root.modules())
    found = _recorded(evaluated, wanted, (args, kwargs), dict.fromkeys(modules, True))
    if not _too_few(found):
        return found
    # one value a channel has no variance: in eval mode the norms return the same shapes
    modes = {module: not isinstance(module, AnyBatchNorm) for module in modules}
    return _recorded(evaluated, wanted, (args, kwargs), modes)


def _recorded(
    evaluated: Recorder, wanted: dict[str, Frame], inputs: tuple[Any, Any], modes: dict[nn.Module, bool]
) -> Training:
    runs: list[Training] = []
    for real in (False, True) if evaluated.fake is not None else (True,):
        recorder = _TrainingRecorder(evaluated, set(wanted), modes, real=real)
        runs.append(_run(recorder, inputs))
        if runs[-1].failure is None or _too_few(runs[-1]):
            break
    found = next((run for run in runs if run.failure is None), runs[0])
    if missing := [frame for path, frame in wanted.items() if path not in found.frames]:
        recorder = _TrainingRecorder(evaluated, set(wanted), modes, real=evaluated.fake is None)
        with recorder.recording():
            found = replace(found, alone={frame.path: [recorder.alone(frame)] for frame in missing})
    return found


def _run(recorder: _TrainingRecorder, inputs: tuple[Any, Any]) -> Training:
    failure = None
    args, kwargs = recorder.example(inputs)
    with recorder.recording():
        try:
            recorder.root(*args, **kwargs)
        except _NeedsNumbers:
            failure = "it decides by the numbers in a tensor"
        except Exception as error:  # noqa: BLE001 - targets that training wants, code that only takes real tensors
            failure = f"{type(error).__name__}: {error}"
    frames: dict[str, list[Frame]] = {}
    for frame in recorder.frames:
        # of a run that stopped, what it was in the midst of says nothing
        if frame.graph is not None or failure is None:
            frames.setdefault(frame.path, []).append(frame)
    return Training(frames, {}, recorder.origins, failure)


def _too_few(found: Training) -> bool:
    """Whether a norm was given one value for each channel, of which it takes no statistics in training."""
    every = (f.failure for calls in (found.frames, found.alone) for frames in calls.values() for f in frames)
    return any("more than 1 value per channel" in str(failure) for failure in (found.failure, *every))
