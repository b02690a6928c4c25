"""One module's frame -> an fx graph, with a value at every node.

A frame is the code of one module's own `forward`; the children it calls stay opaque. It is traced by running it on
proxies that carry example values (fake tensors: shapes and dtypes, no data), so that branching on `None`, on a
shape or on a Python number, tuples from children and factory functions all trace as they run. What such a branch
looked at becomes a guard (`Guards`): the graph holds for calls that agree on it, any other call is traced again.

`Recorder` runs a whole model that way once: every frame traces itself when its turn comes, and the values flowing
between frames tell afterwards which residual follows which (`revwire.probe`).
"""

from __future__ import annotations

import inspect
import itertools
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode

from revwire._torch import FakeTensorMode, TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from revwire.rearrange import is_rearrangement

_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
_CONCRETE = {
    "dtype": "dtype",
    "device": "device",
    "layout": "dtype",
    "ndim": "shape",
    "is_cuda": "device",
    "is_cpu": "device",
    "is_mps": "device",
    "is_sparse": "dtype",
    "is_nested": "dtype",
}


class TraceFailure(Exception):  # noqa: N818 - not an error of the user's: the frame merely stays as it is
    """A frame does something that a graph of it would not reproduce. Its message completes "the frame ..."."""


class _Marker:
    """The type of `TENSOR`."""

    def __repr__(self) -> str:
        return "a tensor"


TENSOR = _Marker()
"""Marks the place of a tensor among the constants a frame was called with."""

Identity = tuple[int, int]
"""A tensor as it was at one moment: the object and its in-place version."""


def identity(value: Any) -> Identity:
    """What tells two traced values apart: the tensor object and how often it was changed in place."""
    return id(value), value._version


@dataclass
class Guards:
    """What a traced frame looked at, beyond the structure of its arguments, to decide what to run.

    Attributes:
        properties: Of the input tensors: any of `"shape"`, `"dtype"`, `"device"`.
        training: Whether the frame's own code can see `self.training`.
    """

    properties: set[str] = field(default_factory=set)
    training: bool = False


@dataclass
class Frame:
    """One call of one module during a recorded run.

    Attributes:
        path: The module's path in the model.
        module: The module.
        graph: The frame's graph, or None with `failure` saying why there is none.
        guards: What the graph depends on.
        spec: Structure of `(args, kwargs)`.
        constants: The leaves of that structure, with `TENSOR` for tensors.
        arguments: The leaves' names in the signature of `forward`.
        parent: The frame that called this one, and `caller` the node of its graph that did.
    """

    path: str
    module: nn.Module
    graph: fx.Graph | None = None
    failure: str | None = None
    guards: Guards = field(default_factory=Guards)
    spec: TreeSpec | None = None
    constants: tuple[Any, ...] = ()
    arguments: tuple[str, ...] = ()
    parent: Frame | None = None
    caller: fx.Node | None = None

    def label(self, node: fx.Node) -> str:
        """What the author of the frame calls a node: the argument's name, or the node's own."""
        return (
            self.arguments[int(str(node.target)[len("input_") :])] if node.op == "placeholder" else node.name
        )


class ValueProxy(fx.Proxy):
    """A proxy that knows its example value, so Python code can look at it and go on."""

    tracer: FrameTracer

    def __init__(self, node: fx.Node, tracer: FrameTracer) -> None:
        super().__init__(node, tracer)

    @property
    def value(self) -> Any:
        """The example value this proxy stands for."""
        return self.node.meta["value"]

    @property
    def __class__(self) -> type:  # what isinstance() sees in the code being traced
        return type(self.value) if not isinstance(self.value, Tensor) else torch.Tensor

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise AttributeError("__class__")

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.value, Tensor):
            if name in _CONCRETE:
                self.tracer.guards.properties.add(_CONCRETE[name])
                return getattr(self.value, name)
            if name in {"requires_grad", "grad_fn", "is_leaf", "grad", "data"}:
                raise TraceFailure(f"reads .{name} of a tensor")
        if not hasattr(self.value, name):
            raise AttributeError(name)
        if callable(getattr(self.value, name)):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _concrete(self) -> Any:
        if isinstance(self.value, Tensor):
            raise TraceFailure("decides by the numbers in a tensor")
        self.tracer.guards.properties.add("shape")
        return self.value

    def __bool__(self) -> bool:
        return bool(self._concrete())

    def __int__(self) -> int:
        return int(self._concrete())

    def __float__(self) -> float:
        return float(self._concrete())

    def __index__(self) -> int:
        return operator.index(self._concrete())

    def __hash__(self) -> int:
        return id(self) if isinstance(self.value, Tensor) else hash(self._concrete())

    def __len__(self) -> int:
        if isinstance(self.value, Tensor):
            self.tracer.guards.properties.add("shape")
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        return (self[i] for i in range(len(self)))

    def __contains__(self, item: object) -> bool:
        if isinstance(self.value, Tensor):
            raise TraceFailure("decides by the numbers in a tensor")
        return item in (self.value if isinstance(self.value, dict) else self._concrete())

    def keys(self) -> Any:
        """Keys of a proxied dict, so that `**proxy` works."""
        return self.value.keys()

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueProxy:
        return self


def _inplace_operator(name: str) -> Callable[[ValueProxy, Any], Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _INPLACE:
    setattr(ValueProxy, f"__{_name}__", _inplace_operator(_name))


class FrameTracer(TracerBase):
    """Builds one frame's graph while the frame's code runs on `ValueProxy` arguments."""

    def __init__(self, recorder: Recorder, frame: Frame) -> None:
        super().__init__()
        self.recorder = recorder
        self.frame = frame
        self.guards = frame.guards
        self.graph = fx.Graph()
        self.scope = fx.proxy.Scope("", None)
        self.module_stack = {}  # type: ignore[assignment]
        self.node_name_to_scope = {}
        self.contexts = _contexts()
        self.paths = {id(m): name for name, m in frame.module.named_modules(remove_duplicate=True)}

    def proxy(self, node: fx.Node) -> ValueProxy:
        """A value-carrying proxy for `node`."""
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Record a call and compute its example value."""
        if kind not in {"call_function", "call_method"}:
            return super().create_proxy(kind, target, args, kwargs, *rest, **named)
        stale = self.reads_stale(args, kwargs)
        values, keywords = self.unwrap((args, kwargs))
        function = target
        if kind == "call_method":
            own = isinstance(values[0], Tensor)
            function = getattr(Tensor if own else values[0], target)
            values = values if own else values[1:]
        value = self.recorder.compute(function, values, keywords)
        if value is NotImplemented:
            return value
        return self.record(kind, target, args, kwargs, value, stale=stale)

    def reads_stale(self, *tree: Any) -> bool:
        """Whether an argument was changed in place after the node it is known by."""
        return any(
            p.value._version != p.node.meta["version"]
            for p in tree_flatten(tree)[0]
            if type(p) is ValueProxy and isinstance(p.value, Tensor)
        )

    def record(
        self, kind: str, target: Any, args: Any, kwargs: Any, value: Any, *, stale: bool = False
    ) -> ValueProxy:
        """Record a node whose example value is known."""
        if _contexts() != self.contexts:
            raise TraceFailure("runs part of its code under a context of its own (autocast, no_grad)")
        proxy: ValueProxy = super().create_proxy(kind, target, args, kwargs)  # type: ignore[assignment]
        order = next(self.recorder.order)
        proxy.node.meta.update(value=value, stale=stale, line=_user_line(self.frame.module), order=order)
        proxy.node.meta["version"] = value._version if isinstance(value, Tensor) else 0
        return proxy

    def unwrap(self, tree: Any) -> Any:
        """The example values in a structure of proxies."""
        return tree_map(lambda leaf: leaf.value if type(leaf) is ValueProxy else leaf, _plain_slices(tree))

    def create_arg(self, a: Any) -> Any:
        """Lower an argument into the graph; a module's own tensors become reads of its attributes."""
        if type(a) is ValueProxy:
            if a.tracer is not self:
                raise TraceFailure("keeps a tensor of an earlier call")
            return a.node
        if isinstance(a, Tensor):
            return self.create_arg(self.attribute(a))
        if isinstance(a, nn.Module):
            raise TraceFailure(f"passes the module {type(a).__name__} to a function as a value")
        return super().create_arg(a)

    def attribute(self, tensor: Tensor) -> ValueProxy:
        """The proxy of a tensor that some module below this frame holds as a plain attribute."""
        for name, module in self.frame.module.named_modules():
            for key, held in module.__dict__.items():
                if held is tensor:
                    return self.record("get_attr", f"{name}.{key}" if name else key, (), {}, tensor)
        raise TraceFailure("uses a tensor that is no attribute of the module")

    def parameter(self, module: nn.Module, key: str, value: Tensor) -> ValueProxy:
        """The proxy of a parameter or buffer read by this frame's code."""
        if (path := self.paths.get(id(module))) is None:
            raise TraceFailure(f"reads {key!r} of a module outside of it")
        return self.record("get_attr", f"{path}.{key}" if path else key, (), {}, value)


class _Functions(TorchFunctionMode):
    """Sends every torch function to the frame being traced, factory functions without tensors included."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.recorder.tracing
        if tracer is None:
            return self.recorder.compute(func, args, kwargs)
        name = getattr(func, "__name__", "")
        kind, target = (
            ("call_method", name) if getattr(Tensor, name, None) is func else ("call_function", func)
        )
        if any(type(leaf) is ValueProxy for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy(kind, target, args, kwargs)
        value = self.recorder.compute(func, args, kwargs)
        made = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        return tracer.record(kind, target, args, kwargs, value) if made else value


class Recorder:
    """Runs a model, or one frame of it, once on example values, and records every frame.

    Use as a context manager: inside, modules called through `nn.Module.__call__` trace themselves (without their
    hooks), parameters and buffers are fake stand-ins, and random state is left as it was.
    """

    def __init__(self, root: nn.Module, *, nested: bool = True) -> None:
        self.root = root
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.frames: list[Frame] = []
        self.origins: dict[Identity, Identity] = {}
        self.tracing: FrameTracer | None = None
        self.order = itertools.count()
        self._nested = nested
        self._calling: Frame | None = None
        self._caller: fx.Node | None = None
        self._alive: list[Any] = []
        self._names = {id(m): name for name, m in root.named_modules()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Fake parameters, patched calls and saved random state, for the length of the block."""
        with ExitStack() as stack:
            stack.enter_context(_random_kept())
            stack.enter_context(_attributes_kept(self.root))
            self._stand_in_fakes()
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.fake)
            stack.enter_context(_patched_modules(self))
            stack.enter_context(_patched_functions(self))
            stack.enter_context(_Functions(self))
            yield

    def _stand_in_fakes(self) -> None:
        for module in self.root.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        tensors[key] = self.fake.from_tensor(tensor)

    def example(self, tree: Any) -> Any:
        """`tree` with its tensors replaced by fake ones of the same shape, dtype, device and strides."""
        return tree_map(lambda t: self.fake.from_tensor(t.detach()) if isinstance(t, Tensor) else t, tree)

    def compute(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function` on example values; remembers which results are mere rearrangements of which."""
        source = args[0] if args and isinstance(args[0], Tensor) else None
        before = None if source is None else identity(source)
        outer, self.tracing = self.tracing, None
        try:
            result = function(*args, **kwargs)
        finally:
            self.tracing = outer
        if isinstance(result, Tensor):
            self._alive.append(result)
            if before and result is not source and is_rearrangement(function, args, kwargs):
                self.origins[identity(result)] = before
        return result

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `nn.Module.__call__` becomes while recording."""
        tracer = self.tracing
        if tracer is None:
            return self._run(module, args, kwargs, None)
        if (path := tracer.paths.get(id(module))) is None:
            raise TraceFailure(f"calls a {type(module).__name__} that is no child of it")
        stale = tracer.reads_stale(args, kwargs)
        values, named = tracer.unwrap((args, kwargs))
        proxy = tracer.record("call_module", path, args, kwargs, None, stale=stale)
        result = self._run(module, values, named, proxy.node)
        proxy.node.meta.update(value=result, version=result._version if isinstance(result, Tensor) else 0)
        return proxy

    def _run(self, module: nn.Module, args: Any, kwargs: Any, caller: fx.Node | None) -> Any:
        outer = self.tracing, self._calling, self._caller
        drawn = _python_random()
        frame = Frame(self._names.get(id(module), ""), module, parent=self._calling, caller=caller)
        self.tracing, self._calling = None, frame
        try:
            if not self._nested or _is_plain(module):
                return original_forward(module)(*args, **kwargs)
            mark = len(self.frames)
            self.frames.append(frame)
            try:
                return self.trace(frame, args, kwargs)
            except TraceFailure as failure:
                frame.failure, frame.graph = str(failure), None
            except Exception as error:  # noqa: BLE001 - proxies meet code that only takes real tensors
                frame.failure, frame.graph = (
                    f"cannot be traced: {type(error).__name__}: {_first_line(error)}",
                    None,
                )
            del self.frames[mark + 1 :]
            self.tracing = None
            return original_forward(module)(*args, **kwargs)
        finally:
            self.tracing, self._calling, self._caller = outer
            self._drawn_by_children = drawn != _python_random()

    def trace(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        """Trace one frame on example values; fills `frame` and returns the frame's value.

        Raises:
            TraceFailure: the frame does something a graph would not reproduce.
        """
        module = frame.module
        tracer = FrameTracer(self, frame)
        leaves, frame.spec = tree_flatten((args, kwargs))
        frame.constants = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        frame.arguments = _argument_names(module, args, kwargs)
        frame.guards.training = _reads_training(type(module))
        inputs = [
            tracer.record("placeholder", f"input_{i}", (), {}, leaf) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = tree_unflatten(inputs, frame.spec)
        attributes, drawn = _state(module), _python_random()
        self.tracing, self._drawn_by_children = tracer, False
        try:
            output = original_forward(module)(*args, **kwargs)
        finally:
            self.tracing = None
            now = _state(module)
            changed = sorted(key for key, value in now.items() if attributes.get(key, now) is not value)
        if changed:
            raise TraceFailure(
                f"stores a value on the module in forward: {', '.join(key for _, key in changed)}"
            )
        if drawn != _python_random() and not self._drawn_by_children:
            raise TraceFailure("draws Python random numbers to decide what to run")
        tracer.graph.output(tracer.create_arg(output))
        _drop_unused_numbers(tracer.graph)
        frame.graph = tracer.graph
        return tracer.unwrap(output)


@contextmanager
def _patched_modules(recorder: Recorder) -> Iterator[None]:
    """Module calls and reads of parameters go through `recorder`."""
    call, getattribute, thread = nn.Module.__call__, nn.Module.__getattr__, threading.get_ident()

    def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(module, *args, **kwargs)
        return recorder.call(module, args, kwargs)

    def patched_getattr(module: nn.Module, key: str) -> Any:
        value = getattribute(module, key)
        if recorder.tracing is not None and isinstance(value, Tensor) and threading.get_ident() == thread:
            return recorder.tracing.parameter(module, key, value)
        return value

    nn.Module.__call__, nn.Module.__getattr__ = patched_call, patched_getattr  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattribute  # type: ignore[method-assign]


@contextmanager
def _patched_functions(recorder: Recorder) -> Iterator[None]:
    """A custom autograd.Function called by a frame's own code would dissolve into its forward: refuse it."""
    apply = torch.autograd.Function.__dict__["apply"]

    def patched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.tracing is not None:
            raise TraceFailure(
                f"calls the autograd.Function {cls.__name__} itself; in a module of its own it is fine"
            )
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(patched)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


@contextmanager
def _attributes_kept(root: nn.Module) -> Iterator[None]:
    """Every module's attributes, parameters and buffers as they were, whatever a forward stores in them."""
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in root.modules()]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in kept:
            for target, source in (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module.__dict__, attributes),
            ):
                target.clear()
                target.update(source)


@contextmanager
def _random_kept() -> Iterator[None]:
    state, python = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)


def _python_random() -> Any:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state()[1].tobytes() if numpy else None


def _argument_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """For each leaf of `(args, kwargs)`, the parameter of `forward` that receives it."""
    bound = inspect.signature(original_forward(module)).bind(*args, **kwargs)
    names = {id(value): name for name, value in bound.arguments.items()}
    for name, value in bound.arguments.items():
        if isinstance(value, tuple | dict):
            names.update((id(v), name) for v in (value.values() if isinstance(value, dict) else value))
    return tuple(
        names.get(id(top), "?") for top in (*args, *kwargs.values()) for _ in range(len(tree_leaves(top)))
    )


def _drop_unused_numbers(graph: fx.Graph) -> None:
    """Erase shape arithmetic nobody uses: `B, N, C = x.shape` reads more than most code needs."""
    for node in reversed(graph.nodes):
        pure = node.target is getattr or getattr(node.target, "__module__", None) == "_operator"
        if (
            node.op == "call_function"
            and pure
            and not node.users
            and not isinstance(node.meta["value"], Tensor)
        ):
            graph.erase_node(node)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as its author wrote it, also where revwire has put another in its place."""
    written = getattr(type(module), "revwire_original", None)
    if written is None or "forward" in module.__dict__:
        return module.forward
    bound: Callable[..., Any] = written.forward.__get__(module)
    return bound


def _state(module: nn.Module) -> dict[tuple[str, str], Any]:
    stores = {"": module.__dict__, "parameters": module._parameters, "buffers": module._buffers}
    return {(store, key): value for store, held in stores.items() for key, value in held.items()}


def _contexts() -> tuple[bool, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in kinds))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch's own without children: an operation, nothing to look into."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _reads_training(cls: type) -> bool:
    """Whether a module class's own methods mention `training`."""
    owners = [c for c in cls.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    codes = [f.__code__ for c in owners for f in vars(c).values() if hasattr(f, "__code__")]
    while codes:
        code = codes.pop()
        if "training" in code.co_names or "training" in code.co_consts:
            return True
        codes.extend(c for c in code.co_consts if hasattr(c, "co_names"))
    return False


def _user_line(module: nn.Module) -> str:
    """`file.py:123` of the code being traced: the innermost line in the file of the module's class."""
    file = sys.modules[type(module).__module__].__dict__.get("__file__")
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code.co_filename == file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _plain_slices(tree: Any) -> Any:
    """Slices opened up: pytrees treat them as leaves, and `x[:, :n]` may hold a proxy as `n`."""

    def opened(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            parts = (leaf.start, leaf.stop, leaf.step)
            return slice(*(p.value if type(p) is ValueProxy else p for p in parts))
        return leaf

    return tree_map(opened, tree)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
