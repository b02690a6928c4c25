"""Runs a model, or one frame of it, on fake tensors and records every frame.

Every frame traces itself when its turn comes (`revwire.trace.tracer`), and the values that flow between frames tell
afterwards which residual follows which (`revwire.find.probe`). Nothing of the model changes: parameters and buffers are
fake stand-ins, hooks do not fire, attributes and random states are put back.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._torch import FakeTensor, FakeTensorMode, quiet_fake_tensors
from revwire.pytree import is_object, snapshot, tree_flatten, tree_leaves, tree_map, tree_unflatten
from revwire.run.rearrange import is_rearrangement
from revwire.trace.frame import (
    Frame,
    TraceFailure,
    argument_names,
    first_line,
    identity,
    is_plain,
    original_forward,
)
from revwire.trace.graph import drop_unused, leaves_alone, unread_inputs
from revwire.trace.guards import Inlined, constant_for, is_input, may_inline
from revwire.trace.origins import Origins
from revwire.trace.outside import Outside
from revwire.trace.patches import (
    TRACING,
    FunctionsRecorded,
    patched_factories,
    patched_functions,
    patched_modes,
    patched_modules,
    silent,
)
from revwire.trace.proxy import ValueProxy, answering_isinstance
from revwire.trace.sandbox import Attributes, attributes_kept, python_random, random_kept
from revwire.trace.sums import belongs_to_caller, may_be_planned
from revwire.trace.tracer import FrameTracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import CodeType


class Recorder:
    """Runs a model, or one frame of it, once on example values, and records every frame.

    Use as a context manager: inside, modules called through `nn.Module.__call__` trace themselves (without their
    hooks), reads of parameters and buffers are given fake stand-ins, and random state is left as it was.

    Args:
        root: The model, or the one module.
        nested: Trace the frames of children too.
        real: Run on real tensors, for a model that decides by the numbers in them.
        inline: Paths of modules whose code belongs to the frame of their caller; `nested` recordings find out more.
        unread: What children read no values of (`Guards.unread`); `nested` recordings find out.
        grad: Whether the code runs with gradients enabled.
        modes: The modules that the code is to find in another mode than they are in, with whether they train.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        nested: bool = True,
        real: bool = False,
        inline: Iterable[str] = (),
        unread: Mapping[str, frozenset[int]] | None = None,
        grad: bool = True,
        modes: Mapping[nn.Module, bool] | None = None,
    ) -> None:
        self.root = root
        self.modes = {id(module): training for module, training in (modes or {}).items()}
        self.fake = None if real else FakeTensorMode(allow_non_fake_inputs=True)
        self.frames: list[Frame] = []
        self.origins = Origins()
        self.tracing: FrameTracer | None = None
        self.order = itertools.count()
        self._nested = nested
        self._calling: Frame | None = None
        self._alive: list[Any] = []
        self._grad = grad
        self._of_children: set[tuple[str, tuple[int, ...]]] = set()
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._names = {id(m): name for name, m in root.named_modules()}
        there = dict(root.named_modules(remove_duplicate=False))  # a child may be gone since
        self._inline = {id(there[path]) for path in inline if path in there}
        self._unread = {id(there[path]): leaves for path, leaves in (unread or {}).items() if path in there}

    @property
    def root_code(self) -> CodeType:
        """The code that runs a frame's forward."""
        return Recorder.trace.__code__

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Fake parameters, patched calls and saved random state, for the length of the block."""
        with ExitStack() as stack:
            stack.enter_context(TRACING)
            # what the model warns of here it warns of again when it runs, there with the line that is to blame
            stack.enter_context(silent())
            stack.enter_context(random_kept(drawn=self.fake is None))
            stack.enter_context(quiet_fake_tensors())
            stack.enter_context(attributes_kept(self.root))
            self._outside = Outside(self.root)
            stack.enter_context(self._outside.untouched())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            # a first call may come under a checkpoint's hooks, which count what is saved
            stack.enter_context(saved_tensors_hooks(_without_history, _unchanged))
            if self.fake is not None:
                stack.enter_context(self.fake)
            stack.enter_context(patched_modes(self, self.root.modules()))
            stack.enter_context(patched_modules(self))
            stack.enter_context(patched_functions(self))
            stack.enter_context(patched_factories())
            stack.enter_context(answering_isinstance())
            stack.enter_context(FunctionsRecorded(self))
            yield

    def stand_in(self, tensor: Tensor) -> Tensor:
        """What a parameter or buffer is in this run: always the same fake tensor or, `real`, the same copy."""
        if id(tensor) in self._stand_ins:
            return self._stand_ins[id(tensor)][1]
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.unobserved():
            made = self._like(tensor)
        self._stand_ins[id(tensor)] = self._stand_ins[id(made)] = (tensor, made)
        return made

    def _like(self, tensor: Tensor) -> Tensor:
        if self.fake is not None:
            return self.fake.from_tensor(tensor)
        copy = tensor.detach().clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy

    def example(self, tree: Any) -> Any:
        """`tree` with fake tensors like its own (or, `real`, copies of them) in their place; objects are copied.

        Call it before `recording`: inside, a real tensor would be detached on its way through the fake mode.
        """

        def stand_in(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._like(leaf.detach())
            # an object that the run may change is a copy too, with fake tensors in it
            return snapshot(leaf, stand_in) if is_object(leaf) else leaf

        return tree_map(stand_in, tree)

    def compute(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function` on example values; remembers which results are mere rearrangements of which."""
        source = args[0] if args and isinstance(args[0], Tensor) else None
        before = None if source is None else identity(source)
        with self.unobserved():
            result = function(*args, **kwargs)
            unchanged = source is not None and result is source and before == identity(source)
            if unchanged and not is_rearrangement(function, args, kwargs):
                # dropout in eval mode hands back its very input, yet at run time it leaves the chain
                result = result.view(result.shape)
            self._alive += self.origins.note(function, args, kwargs, before, result)
        return result

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """What the block runs is no part of the frame being traced."""
        outer, self.tracing = self.tracing, None
        try:
            yield
        finally:
            self.tracing = outer

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `nn.Module.__call__` becomes while recording."""
        tracer = self.tracing
        if tracer is None:
            return self._run(module, args, kwargs, None)
        if (path := tracer.paths.get(id(module))) is None:
            raise TraceFailure(f"calls a {type(module).__name__} that is no child of it")
        _check_random(tracer)
        if id(module) in self._inline and may_inline(module):
            return self._run_inline(tracer, path, module, args, kwargs)
        args, kwargs = tracer.fresh((args, kwargs))
        values, named = tracer.unwrap((args, kwargs))
        given = tree_flatten((values, named))
        before = tracer.versions(args, kwargs)
        mark = len(self.frames)
        proxy = tracer.record("call_module", path, args, kwargs, None)
        result = self._run(module, values, named, proxy.node)
        tracer.give_value(proxy.node, result)
        tracer.note_changes(proxy.node, before)
        changes_lists = not _same_structure(given, (values, named))
        child = self.frames[mark] if len(self.frames) > mark else None
        inlines = self._nested and may_inline(module) and not proxy.node.meta["changes"]
        if inlines and (changes_lists or belongs_to_caller(child, tracer.frame, proxy.node)):
            tracer.forget(proxy.node)
            del self.frames[mark:]
            self._inline.add(id(module))
            return self._run_inline(tracer, path, module, args, kwargs)
        if (unread := self._unread.get(id(module))) is None:
            unread = self._unread[id(module)] = unread_inputs(child)
        tracer.guards.unread[path], proxy.node.meta["unread"] = unread, leaves_alone(proxy.node, unread)
        if changes_lists:
            raise TraceFailure(f"hands {path} a list or dict, which that changes")
        tracer.expected_random = python_random()  # what a child draws, it draws again when it runs
        return tracer.handed(proxy)

    def _run_inline(
        self, tracer: FrameTracer, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run a child's code as part of the frame being traced."""
        tracer.guards.inlined[path] = Inlined(path, type(module))
        attributes = Attributes(module)
        output = original_forward(module)(*args, **kwargs)
        if changed := attributes.changed():
            attributes.put_back()
            raise TraceFailure(f"stores a value on {path} in forward: {', '.join(changed)}")
        return output

    def _run(self, module: nn.Module, args: Any, kwargs: Any, caller: fx.Node | None) -> Any:
        outer = self.tracing, self._calling
        frame = Frame(self._names.get(id(module), ""), module, parent=self._calling, caller=caller)
        self.tracing, self._calling = None, frame
        try:
            if is_plain(module):
                return original_forward(module)(*args, **kwargs)
            if not self._nested:
                return self._untraced(module, args, kwargs)
            mark = len(self.frames)
            self.frames.append(frame)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if is_object(leaf)]
            before = [snapshot(leaf, lambda tensor: tensor) for leaf in given]
            try:
                return self.trace(frame, args, kwargs)
            except TraceFailure as failure:
                frame.failure, frame.graph = str(failure), None
            except Exception as error:  # noqa: BLE001 - proxies meet code that only takes real tensors
                frame.failure = f"cannot be traced: {type(error).__name__}: {first_line(error)}"
                frame.graph = None
            del self.frames[mark + 1 :]
            self.tracing = None
            for leaf, was in zip(given, before, strict=True):
                # what the frame changed before it failed, it changes again
                leaf.__dict__.update(was.__dict__)
            return self._untraced(module, args, kwargs)
        finally:
            self.tracing, self._calling = outer

    def _untraced(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        with self.blamed_on_children():
            return original_forward(module)(*args, **kwargs)

    @contextmanager
    def blamed_on_children(self) -> Iterator[None]:
        """What the block changes outside of the model is not the doing of the code that called for it."""
        before = self._outside.changed()
        try:
            yield
        finally:
            self._of_children |= self._outside.changed() - before

    def trace(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        """Trace one frame on example values; fills `frame` and returns the frame's value.

        Raises:
            TraceFailure: the frame does something a graph would not reproduce.
        """
        module = frame.module
        tracer = FrameTracer(self, frame)
        leaves, frame.guards.spec = tree_flatten((args, kwargs))
        frame.guards.constants = tuple(map(constant_for, leaves))
        frame.arguments = argument_names(module, args, kwargs)
        inputs = [
            tracer.record("placeholder", f"input_{i}", (), {}, leaf) if is_input(leaf) else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = tree_unflatten(inputs, frame.guards.spec)
        given = tree_flatten((args, kwargs))
        attributes = Attributes(module)
        tracer.expected_random = python_random()
        hidden = self._outside.hide_stand_ins()
        before = self._outside.changed()
        self.tracing = tracer
        try:
            output = original_forward(module)(*args, **kwargs)
        finally:
            self.tracing = None
            if changed := attributes.changed():
                # what it stored are stand-ins, which nothing that follows must find
                attributes.put_back()
            outside = self._outside.changed() - before - self._of_children
            self._of_children |= outside
            caches = self._outside.filled()
            self._outside.hide_stand_ins()
            for put_back in hidden:
                put_back()
            if not self._nested or may_be_planned(tracer.graph, module):
                frame.guards.note_reads(module, caches)
        if not _same_structure(given, (args, kwargs)):
            raise TraceFailure("changes a list or dict that it is given")
        if changed:
            raise TraceFailure(f"stores a value on the module in forward: {', '.join(changed)}")
        if outside:
            raise TraceFailure(
                f"changes what outlives the call: {', '.join(sorted({n for n, _ in outside}))}"
            )
        _check_random(tracer)
        frame.guards.seal(leaves)
        output = tracer.fresh(output)
        returned, spec = tree_flatten(output)
        if all(type(leaf) is ValueProxy for leaf in (output if type(output) is tuple else (output,))):
            tracer.graph.output(tracer.create_arg(output))
        else:
            # dicts, dataclasses and classes of outputs are made again outside of the graph
            frame.output = spec
            tracer.graph.output(tracer.create_arg(tuple(returned)))
        drop_unused(tracer.graph)
        frame.graph = tracer.graph
        return tracer.unwrap(output)


def _without_history(tensor: Tensor) -> Tensor:
    # an operation that saved its own output as it is would hold itself, and all before it, for good
    return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _check_random(tracer: FrameTracer) -> None:
    if tracer.expected_random != python_random():
        raise TraceFailure("draws Python random numbers to decide what to run")


def _same_structure(before: tuple[list[Any], Any], tree: Any) -> bool:
    """Whether lists and dicts in `tree` hold the same objects as when it was flattened."""
    leaves, spec = tree_flatten(tree)
    return spec == before[1] and all(a is b for a, b in zip(before[0], leaves, strict=True))
