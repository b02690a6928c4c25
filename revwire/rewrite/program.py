"""What a rewired module runs: its frame's rewritten forward for each way it is called.

A frame is traced for one call signature. Another one (an argument that was None, another shape where the code looks at
shapes, another `self.drop_rate`) is traced when it first comes, on fake tensors, or on real ones where code takes no
others. Where that fails the call is an error: the original forward is another function. It runs, on the merged tensor,
only for who asked for it (`fallback="original"`), and where none of the module's own sums is a step.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import TreeSpec, not_compiled, only_shapes
from revwire.errors import RewireError
from revwire.find.additions import find_residuals
from revwire.find.blocks import find_blocks
from revwire.find.branch_code import StepCode, step_code
from revwire.find.consecutive import places
from revwire.pytree import tree_flatten, tree_leaves, tree_unflatten
from revwire.rewrite.compiled import compiled_code
from revwire.rewrite.forward import rewritten_forward
from revwire.rewrite.step import run_step
from revwire.rewrite.variant import Variant
from revwire.rewrite.wired import PROGRAM
from revwire.run.recompute import run_again
from revwire.run.state import Known
from revwire.run.streams import settle
from revwire.run.travelling import is_travelling
from revwire.trace.frame import Frame, TraceFailure, original_forward
from revwire.trace.guards import Guards, is_input
from revwire.trace.patches import TRACING
from revwire.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from revwire.find.consecutive import Calls
    from revwire.find.residual import Residual
    from revwire.planning.plan import Joined, Step
    from revwire.run.options import Options


_MAX_VARIANTS = 64  # an argument that is another number at every call must not fill memory with code


class Program:
    """The rewritten forwards of one module.

    Args:
        frame: The module's frame as planned.
        steps: The frame's residuals that are steps, by their index in the frame.
        ends: Those of them that end their chain and hand on a plain tensor.
        options: How steps run.
        joined: The frame's children that run again together, wherever it calls them one after the other.
        begins: Those of the steps that begin their chain, whatever they are given.
        cuts: Those of them whose sum is cut in pieces and joined again before the next step.
        trained: What the frame was in train mode, where its code can see that.
    """

    def __init__(
        self,
        frame: Frame,
        steps: dict[int, Step],
        ends: frozenset[int],
        options: Options,
        joined: tuple[Joined, ...] = (),
        *,
        begins: frozenset[int] = frozenset(),
        cuts: frozenset[int] = frozenset(),
        trained: Iterable[Frame] = (),
    ) -> None:
        self.steps, self.options, self.joined = steps, options, joined
        self.begins, self.ends, self.cuts = begins, ends, cuts
        self.inlined, self.unread = frozenset(frame.guards.inlined), dict(frame.guards.unread)
        self._variants: list[Variant] = []
        self._refused: list[tuple[TreeSpec, Guards]] = []
        self._known: dict[int, Known] = {}
        for each in (frame, *trained):
            self._add(each)

    def __getstate__(self) -> dict[str, Any]:
        # generated code is made again where the program is loaded, at the first call
        return {**self.__dict__, "_variants": [], "_refused": [], "_known": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        copy = object.__new__(Program)
        copy.__dict__.update(self.__getstate__(), _variants=list(self._variants))
        return copy

    def known(self, step: Step) -> Known:
        """What the modules of a step held when it ran last."""
        return self._known.setdefault(step.residual, Known())

    @not_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward, rewired."""
        leaves, spec = tree_flatten((args, kwargs), is_leaf=is_travelling)
        inputs = list(filter(is_input, leaves))
        if (variant := self._variant_for(module, leaves, spec)) is not None:
            return variant.run(module, inputs)
        if not self._has_refused(module, spec):
            with TRACING:
                # another thread may have traced such a call while this one waited for its turn
                found = self._variant_for(module, leaves, spec) or self._trace(module, args, kwargs)
            if isinstance(found, Variant):
                return found.run(module, inputs)
            if self._must_trace:
                raise RewireError(_untraceable(module, found))
            warnings.warn(
                f"{type(module).__name__}: this call cannot be rewired and runs the original forward: {found}",
                stacklevel=3,
            )
        return original_forward(module)(*settle(args), **settle(kwargs))

    def _variant_for(self, module: nn.Module, leaves: list[Any], spec: TreeSpec) -> Variant | None:
        return next((v for v in self._variants if v.guards.hold(module, leaves, spec)), None)

    def _has_refused(self, module: nn.Module, spec: TreeSpec) -> bool:
        return any(refused == spec and guards.reads_the_same(module) for refused, guards in self._refused)

    def _trace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant | str:
        """Add a variant for a new way of calling; returns it, or why there can be none."""
        for real in (False, True):
            # code may ask whether gradients are wanted, and is traced under the mode of this call
            grad = torch.is_grad_enabled()
            recorder = Recorder(
                module, nested=False, real=real, inline=self.inlined, unread=self.unread, grad=grad
            )
            frame = Frame("", module)
            examples = recorder.example(_trunk_only((args, kwargs)))
            try:
                with _unmoved(examples, real=real), recorder.recording():
                    recorder.trace(frame, *examples)
                variant = self._add(frame)
            except TraceFailure as failure:
                reason = f"its forward {failure}"
                break
            except Exception as error:  # noqa: BLE001 - code that only takes real tensors
                reason = f"its forward cannot be traced: {type(error).__name__}: {error}"
                if only_shapes() or torch.compiler.is_exporting():
                    break
                continue
            assert frame.graph is not None
            for node in frame.graph.nodes:
                node.meta.clear()  # nodes hold each other, and their values, until the garbage collector comes
            return variant
        if frame.guards.spec is not None and not self._must_trace:
            self._refused.append((frame.guards.spec, frame.guards))
        return reason

    @property
    def _must_trace(self) -> bool:
        """Whether a call that cannot be traced is an error."""
        return bool(self.steps) and self.options.fallback == "error"

    def _add(self, frame: Frame) -> Variant:
        # the frame of an nn.Sequential has no additions of its own
        residuals = find_residuals(frame)[0] or find_blocks(frame)
        steps: dict[Residual, Callable[..., Any]] = {}
        for residual in residuals:
            if (step := self.steps.get(residual.index)) is not None:
                if residual.refused:
                    raise TraceFailure(f"has no residual here: {residual.refused}")
                if (chosen := residual.with_post(step.post)) is None:
                    raise TraceFailure(f"has no {step.post} after the sum, as was planned")
                # what looks at each operation cannot look into compiled ones
                compiles = self.options.compile and not (step.inside and step.slices > 1)
                compiled = compiled_code(chosen) if compiles else None
                steps[chosen] = self._runner(step, step_code(chosen), compiled)
        if len(steps) != len(self.steps):
            raise TraceFailure(f"has {len(steps)} residuals where {len(self.steps)} are planned")
        function = rewritten_forward(frame, steps, self._joined_calls(frame, steps))
        variant = Variant(function, frame.output, frame.guards)
        # another list, as other threads may be looking through this one
        self._variants = [*self._variants[-_MAX_VARIANTS + 1 :], variant]
        return variant

    def _joined_calls(self, frame: Frame, steps: Iterable[Residual]) -> dict[Calls, Callable[..., Any]]:
        taken = {node for residual in steps for node in residual.nodes}
        return {
            calls: _joined_runner(joined)
            for joined in self.joined
            for calls in places(frame, joined.children, taken)
        }

    def _runner(self, step: Step, code: StepCode, compiled: StepCode | None) -> Callable[..., Any]:
        index = step.residual
        begins, ends, cut = index in self.begins, index in self.ends, index in self.cuts

        # reads the options from the module it runs for: deep copies share this code, not their options
        def run(module: nn.Module, trunk: Any, *sides: Any) -> Any:
            options = module.__dict__[PROGRAM].options
            fast = compiled if options.compile and not only_shapes() else None
            given = trunk, settle(sides)
            return run_step(module, step, fast or code, options, *given, begins=begins, ends=ends, cut=cut)

        run.__name__ = run.__qualname__ = "step"
        return run


def _untraceable(module: nn.Module, failure: str) -> str:
    return (
        f"{type(module).__name__}: this call cannot be rewired as it was planned: {failure}; the original forward "
        "would be another function than the one that is trained. Call it as in planning, exclude the module "
        '(exclude="..."), or have such calls run the original forward all the same: '
        'revwire.rewire(..., fallback="original")'
    )


@contextmanager
def _unmoved(inputs: Any, *, real: bool) -> Iterator[None]:
    """The generators of the devices that a real run may draw from, put back after the block."""
    leaves = tree_leaves(inputs) if real else []
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices], enabled=bool(devices)):
        yield


def _joined_runner(joined: Joined) -> Callable[..., Any]:
    def run(module: nn.Module, x: Any) -> Any:
        modules = [module.get_submodule(path) for path in joined.children]

        def forward(x: Tensor) -> Tensor:
            for child in modules:
                x = child(x)
            return x

        return run_again(joined.name, modules, forward, module.__dict__[PROGRAM].options, (x,), {})

    run.__name__ = run.__qualname__ = "joined"
    return run


def _trunk_only(tree: Any) -> Any:
    """Arguments with tensors in place of what travels, without merging any streams."""
    leaves, spec = tree_flatten(tree, is_leaf=is_travelling)
    return tree_unflatten([leaf.sample() if is_travelling(leaf) else leaf for leaf in leaves], spec)
