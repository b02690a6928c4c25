"""What a rewired module runs: its frame's rewritten forward for each way it is called.

A frame is traced for one call signature. Another one (an argument that was None, another shape where the code looks at
shapes, train mode where the code looks at `self.training`, another `self.drop_rate`) is traced when it first comes;
where that fails, the original forward runs on the merged tensor, and says so once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import TreeSpec, not_compiled, only_shapes
from revwire.experimental.overlap import can_overlap
from revwire.find.consecutive import places
from revwire.find.residual import Residual, find_blocks, find_residuals
from revwire.planning.slicing import mixes_now
from revwire.planning.transitions import run_again
from revwire.pytree import is_object, tree_flatten, tree_unflatten
from revwire.rewrite.compiled import compiled_code
from revwire.rewrite.forward import StepCode, owner_of, rewritten_forward, step_code
from revwire.run.attention import AttentionInParts
from revwire.run.branch import Branch, Cut
from revwire.run.streams import Streams, as_tensor, is_streams, settle
from revwire.trace.frame import (
    TENSOR,
    Frame,
    Inlined,
    TraceFailure,
    constant_for,
    has_settings,
    original_forward,
    same,
    settings_of,
)
from revwire.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from revwire.find.consecutive import Calls
    from revwire.planning.plan import Joined, Mode
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Exact

PROGRAM = "_revwire_program"
"""The attribute that holds a rewired module's `Program`."""

_MAX_VARIANTS = 64  # an argument that is another number at every call must not fill memory with code


@dataclass(frozen=True)
class Options:
    """How the steps of a rewired model run.

    Attributes:
        coupling: The recurrence.
        exact: Whether streams are in fixed point, and on which grid; True: each chain's follows what enters it.
        sliced: Run branches slice by slice where the plan says so; False runs them whole, for comparison.
        replay: Drop what branches save and run them again in backward; False keeps everything, as plain autograd
            through the same recurrence does, for comparison.
        compile: Run branches by torch.compile; on fake tensors they run as they are.
        overlap: Start a step's second run while the device computes the gradients of the step after it.
    """

    coupling: Coupling
    replay: bool = True
    exact: Exact = False
    sliced: bool = True
    compile: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class Planned:
    """One residual of a frame as the plan wants it run.

    Attributes:
        name: What messages call the step.
        last: Whether it ends its chain and hands on a plain tensor.
        post: What moves into the branch after the sum.
        mode: What the step holds for backward.
        cut: How its branch is run slice by slice, None: all at once.
        parts: In how many slices it is wanted; its softmax attention makes up for those that cannot be had.
    """

    name: str
    last: bool
    post: str | None = None
    mode: Mode = "reverse"
    cut: Cut | None = None
    parts: int = 1


@dataclass(frozen=True)
class Variant:
    """A frame's rewritten forward, and the calls it holds for."""

    function: Callable[..., Any]
    output: TreeSpec | None
    spec: TreeSpec
    constants: tuple[Any, ...]
    training: bool | None
    settings: dict[str, Any]
    properties: dict[str, tuple[Any, ...]]
    attributes: tuple[tuple[int, tuple[str, ...], Any], ...]
    inlined: tuple[Inlined, ...]

    def run(self, module: nn.Module, inputs: list[Any]) -> Any:
        """What the module returns for these input leaves."""
        result = self.function(module, *inputs)
        return result if self.output is None else tree_unflatten(list(result), self.output)

    def fits(self, module: nn.Module, leaves: list[Any], spec: TreeSpec) -> bool:
        """Whether a call of `module` with these argument leaves may run this code."""
        if self.inlined and not all(child.agrees(module) for child in self.inlined):
            return False
        if (
            self.training not in {None, module.training}
            or len(leaves) != len(self.constants)
            or spec != self.spec
        ):
            return False
        for leaf, constant in zip(leaves, self.constants, strict=True):
            found = TENSOR if _is_tensor(leaf) else constant_for(leaf)
            if found is not constant and not same(found, constant):
                return False
        if not has_settings(module, self.settings):
            return False
        if any(not same(_read(leaves[i], names), value) for i, names, value in self.attributes):
            return False
        return all(_properties(key, leaves) == value for key, value in self.properties.items())


class Program:
    """The rewritten forwards of one module.

    Args:
        frame: The module's frame as planned.
        planned: The frame's residuals that are steps, by their index in the frame.
        options: How steps run.
        joined: The frame's children that run again together, wherever it calls them one after the other.
    """

    def __init__(
        self,
        frame: Frame,
        planned: dict[int, Planned],
        options: Options,
        joined: tuple[Joined, ...] = (),
    ) -> None:
        self.planned, self.options, self.joined = planned, options, joined
        self.inlined = frozenset(frame.inlined)
        self._variants: list[Variant] = []
        self._refused: list[tuple[TreeSpec, bool, dict[str, Any]]] = []
        self._add(frame)

    def __getstate__(self) -> dict[str, Any]:
        # generated code is made again where the program is loaded, at the first call
        own = {"planned": self.planned, "options": self.options, "joined": self.joined}
        return {**own, "inlined": self.inlined, "_variants": [], "_refused": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        copy = object.__new__(Program)
        copy.__dict__.update(self.__getstate__(), _variants=list(self._variants))
        return copy

    @not_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward, rewired."""
        leaves, spec = tree_flatten((args, kwargs), is_leaf=is_streams)
        inputs = [leaf for leaf in leaves if _is_tensor(leaf) or is_object(leaf)]
        for variant in self._variants:
            if variant.fits(module, leaves, spec):
                return variant.run(module, inputs)
        if not self._has_refused(module, spec):
            if (failure := self._trace(module, args, kwargs)) is None:
                return self._variants[-1].run(module, inputs)
            self._refused.append((spec, module.training, settings_of(module)))
            warnings.warn(
                f"{type(module).__name__}: this call cannot be rewired and runs the original forward: {failure}",
                stacklevel=3,
            )
        return original_forward(module)(*settle(args), **settle(kwargs))

    def _has_refused(self, module: nn.Module, spec: TreeSpec) -> bool:
        return any(
            refused == spec and training is module.training and has_settings(module, settings)
            for refused, training, settings in self._refused
        )

    def _trace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Add a variant for a new way of calling; returns why there can be none."""
        recorder = Recorder(module, nested=False, inline=self.inlined)
        frame = Frame("", module)
        examples = recorder.example(_trunk_only((args, kwargs)))
        try:
            with recorder.recording():
                recorder.trace(frame, *examples)
            self._add(frame)
            assert frame.graph is not None
            for node in frame.graph.nodes:
                node.meta.clear()  # nodes hold each other, and their values, until the garbage collector comes
        except TraceFailure as failure:
            return f"its forward {failure}"
        except Exception as error:  # noqa: BLE001 - code that only takes real tensors
            return f"its forward cannot be traced: {type(error).__name__}: {error}"
        return None

    def _add(self, frame: Frame) -> None:
        # the frame of an nn.Sequential has no additions of its own
        residuals = find_residuals(frame)[0] or find_blocks(frame)
        steps: dict[Residual, Callable[..., Any]] = {}
        for residual in residuals:
            if (planned := self.planned.get(residual.index)) is not None:
                if residual.refused:
                    raise TraceFailure(f"has no residual here: {residual.refused}")
                if (chosen := residual.with_post(planned.post)) is None:
                    raise TraceFailure(f"has no {planned.post} after the sum, as was planned")
                # what looks at each operation cannot look into compiled ones
                compiles = self.options.compile and planned.parts == 1
                compiled = compiled_code(chosen) if compiles else None
                steps[chosen] = self._runner(planned, step_code(chosen), compiled)
        if len(steps) != len(self.planned):
            raise TraceFailure(f"has {len(steps)} residuals where {len(self.planned)} are planned")
        assert frame.spec is not None
        leaves = [n.meta["value"] for n in frame.graph.nodes if n.op == "placeholder"] if frame.graph else []
        del self._variants[: -_MAX_VARIANTS + 1]
        self._variants.append(
            Variant(
                rewritten_forward(frame, steps, self._joined_calls(frame, steps)),
                frame.output,
                frame.spec,
                frame.constants,
                frame.guards.training,
                frame.guards.settings,
                {key: _properties(key, leaves) for key in sorted(frame.guards.properties)},
                tuple(
                    (int(node[len("input_") :]), names, value)
                    for (node, names), value in frame.guards.attributes.items()
                ),
                tuple(frame.inlined.values()),
            )
        )

    def _joined_calls(self, frame: Frame, steps: Iterable[Residual]) -> dict[Calls, Callable[..., Any]]:
        taken = {node for residual in steps for node in residual.nodes}
        return {
            calls: _joined_runner(joined)
            for joined in self.joined
            for calls in places(frame, joined.children, taken)
        }

    @staticmethod
    def _runner(planned: Planned, code: StepCode, compiled: StepCode | None) -> Callable[..., Any]:
        # reads the options from the module it runs for: deep copies share this code, not their options
        def run(module: nn.Module, trunk: Any, *sides: Any) -> Any:
            options = module.__dict__[PROGRAM].options
            fast = compiled if options.compile and not only_shapes() else None
            return run_step(module, planned, fast or code, options, trunk, settle(sides))

        run.__name__ = run.__qualname__ = "step"
        return run


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


def run_step(
    module: nn.Module, planned: Planned, code: StepCode, options: Options, trunk: Any, sides: tuple[Any, ...]
) -> Any:
    """One step of a chain: enters it where `trunk` is a tensor, goes on where it is a `Streams`."""
    coupling = options.coupling.in_mode(training=module.training)
    shared: list[tuple[Any, ...]] = []

    def branch(x: Tensor, *rest: Any) -> Tensor:
        out: Tensor
        out, *inner = code.branch(module, x, *rest)
        if inner and not shared:
            shared.append(tuple(inner))
        if code.whole:
            # the block as it is, G(x) = s * x + F(x): what it adds to the trunk is the rest
            return (out if code.post is None else code.post(module, out, *rest)) - x
        if code.post is None:
            return out
        # a=b-free couplings take the operation after the sum into the branch; those that keep x[i] as the skip
        # take the whole block G that way: F(x) = G(x) - x
        return code.post(module, out, *rest) if not coupling.b else code.post(module, x + out, *rest) - x

    if not coupling.a:
        x = as_tensor(trunk)
        out, *inner = code.branch(module, x, *sides)
        total = out if code.whole else x + out if code.leads else out + x
        total = total if code.post is None else code.post(module, total, *sides)
        return (total, *inner) if inner else total
    modules = [module.get_submodule(path) for path in code.modules]
    owners = [owner_of(module, path) for path in code.own]
    cut = _cut_now(planned, options, modules, trunk, sides)
    function = _in_parts(planned, options, branch, 1 if cut is None else cut.count(trunk.shape))
    overlap = options.overlap and can_overlap(trunk.device)
    step = Branch(planned.name, function, modules, owners, cut, planned.mode, overlap)
    if not isinstance(trunk, Streams) or not trunk.can_continue(coupling, options.exact):
        trunk = Streams.enter(as_tensor(trunk), coupling, options.exact)
    following = trunk.advance(step, sides, replay=options.replay and not torch.compiler.is_exporting())
    following = following.tensor() if planned.last else following
    if not shared:
        return following
    # the branch outlives the forward, and must not keep what it handed out: an empty tuple tells it that it did
    handed = shared[0]
    shared[0] = ()
    return (following, *handed)


def _cut_now(
    planned: Planned, options: Options, modules: list[nn.Module], trunk: Any, sides: tuple[Any, ...]
) -> Cut | None:
    """The planned cut, where this call has anything to cut and nothing mixes samples in the mode it runs in."""
    cut = planned.cut
    if cut is None or not options.sliced or trunk.shape[cut.dim] < 2 or len(sides) != len(cut.sides):
        return None
    # a side input of one row serves all samples
    if any(c and len(s) != trunk.shape[cut.dim] for c, s in zip(cut.sides, sides, strict=True)):
        return None
    return None if mixes_now(modules) else cut


def _in_parts(
    planned: Planned, options: Options, branch: Callable[..., Tensor], slices: int
) -> Callable[..., Tensor]:
    """The branch with its attention in parts, where it runs in fewer slices than wanted."""
    parts = -(-planned.parts // slices)
    if parts < 2 or not options.sliced or torch.compiler.is_exporting():
        return branch

    def run(x: Tensor, *rest: Any) -> Tensor:
        with AttentionInParts(parts, planned.name):
            return branch(x, *rest)

    return run


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | Streams)


def _read(leaf: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        leaf = getattr(leaf, name, None)
    return leaf


def _properties(key: str, leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, key) for leaf in leaves if _is_tensor(leaf))


def _trunk_only(tree: Any) -> Any:
    """Arguments with one tensor in place of a `Streams`, without making the merged one."""
    leaves, spec = tree_flatten(tree, is_leaf=is_streams)
    return tree_unflatten(
        [leaf.current.detach().to(leaf.dtype) if is_streams(leaf) else leaf for leaf in leaves], spec
    )
