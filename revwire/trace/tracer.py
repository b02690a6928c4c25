"""One module's frame -> an fx graph, with a value at every node.

A frame is the code of one module's own `forward`; the children it calls stay opaque. It is traced by running it
on proxies that carry example values (fake tensors: shapes and dtypes, no data), so that branching on `None`, on a
shape or on a Python number, tuples from children and factory functions all trace as they run. What such a branch
looked at becomes a guard (`Guards`): the graph holds for calls that agree on it, any other call is traced again.

Here the graph is built; `revwire.trace.proxy` has the values that the code runs on, `revwire.trace.frame` what becomes
of it, and `revwire.trace.recorder` runs the code.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from revwire.pytree import is_object, tree_leaves, tree_map
from revwire.trace.code import is_foreign
from revwire.trace.expected import HANDED, child_of, expected
from revwire.trace.frame import Frame, TraceFailure, storage
from revwire.trace.proxy import ValueProxy, updated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import CodeType, FrameType


_READS_NUMBERS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}


class Computes(Protocol):
    """Who runs the code that is traced, and computes example values for it."""

    @property
    def order(self) -> Iterator[int]:
        """Numbers that grow with each operation that runs."""

    @property
    def root_code(self) -> CodeType:
        """The code that runs a frame's forward."""

    def compute(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function` on example values."""

    def unobserved(self) -> AbstractContextManager[None]:
        """What the block runs is no part of the frame being traced."""


class FrameTracer(TracerBase):
    """Builds one frame's graph while the frame's code runs on `ValueProxy` arguments."""

    def __init__(self, recorder: Computes, frame: Frame) -> None:
        super().__init__()
        self.recorder = recorder
        self.frame = frame
        self.guards = frame.guards
        self.graph = fx.Graph()
        self.scope = fx.proxy.Scope("", None)
        self.module_stack = {}  # type: ignore[assignment]
        self.node_name_to_scope = {}
        self.contexts = _contexts()
        self.expected_random: Any = None
        self._newest: dict[int, fx.Node] = {}
        self._changes: list[tuple[int, fx.Node]] = []
        self.paths = {id(m): name for name, m in frame.module.named_modules(remove_duplicate=True)}

    def proxy(self, node: fx.Node) -> ValueProxy:
        """A value-carrying proxy for `node`."""
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Record a call and compute its example value; what code may test as it is comes as it is."""
        if kind not in {"call_function", "call_method"}:
            return super().create_proxy(kind, target, args, kwargs, *rest, **named)
        return self.handed(self.called(kind, target, args, kwargs))

    def called(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The proxy of a call's value."""
        args, kwargs = self.fresh((args, kwargs))
        values, keywords = self.unwrap((args, kwargs))
        function = target
        if kind == "call_method":
            own = isinstance(values[0], Tensor)
            function = getattr(Tensor if own else values[0], target)
            values = values if own else values[1:]
        before = self.versions(args, kwargs)
        value = self.recorder.compute(function, values, keywords)
        if value is NotImplemented:
            return value
        proxy = self.record(kind, target, args, kwargs, value)
        self.note_changes(proxy.node, before)
        return proxy

    def handed(self, proxy: Any) -> Any:
        """What code gets for a value: itself where a child returned a None, a flag or a word, and it may be tested."""
        if type(proxy) is not ValueProxy or not isinstance(proxy.value, HANDED):
            return proxy
        node = proxy.node
        if node.meta["child"] is None and not (node.meta["of_object"] and proxy.value is None):
            return proxy
        self.expect(proxy)
        return proxy.value

    def expect(self, proxy: ValueProxy) -> None:
        """Have the generated code check that a value which is no tensor is what it was when this was traced."""
        node = proxy.node
        if node.meta.get("expected"):
            return
        node.meta["expected"] = True
        child = node.meta["child"]
        self.record("call_function", expected, (proxy, proxy.value, child or node.name), {}, None)
        if child is not None:
            self.guards.expected.add(child)

    def fresh(self, tree: Any) -> Any:
        """A structure of arguments with each tensor known by the newest node that it is the value of.

        Code that changes a tensor in place and goes on with its old name means the changed tensor; in a graph that is
        another node.

        Raises:
            TraceFailure: a tensor was changed by something that this frame did not see.
        """

        def newest(leaf: Any) -> Any:
            if type(leaf) is not ValueProxy or not isinstance(leaf.value, Tensor):
                return leaf
            value, version = leaf.value, leaf.value._version
            if leaf.node.meta["version"] == version:
                return leaf
            known = self._newest.get(id(value))
            if known is not None and known.meta["version"] == version:
                return self.proxy(known)
            key = self._storage(value)
            changes = [node for changed, node in self._changes if changed == key and node > leaf.node]
            if not changes:
                raise TraceFailure("goes on with a tensor that something else changed in place")
            return self.record("call_function", updated, (leaf, *map(self.proxy, changes)), {}, value)

        return tree_map(newest, tree)

    def versions(self, *tree: Any) -> list[tuple[Tensor, int]]:
        """The tensors among the arguments of a call, with their in-place versions."""
        leaves = (p.value for p in tree_leaves(tree) if type(p) is ValueProxy)
        return [(value, value._version) for value in leaves if isinstance(value, Tensor)]

    def note_changes(self, node: fx.Node, before: list[tuple[Tensor, int]]) -> None:
        """Remember on `node` which of its arguments its call has changed in place."""
        changed = frozenset(self._storage(t) for t, version in before if t._version != version)
        node.meta["changes"] = changed
        self._changes += [(key, node) for key in changed]

    def _storage(self, tensor: Tensor) -> int:
        with self.recorder.unobserved():
            return storage(tensor)

    def record(self, kind: str, target: Any, args: Any, kwargs: Any, value: Any) -> ValueProxy:
        """Record a node whose example value is known."""
        if _contexts() != self.contexts:
            raise TraceFailure("runs part of its code under a context of its own (autocast, no_grad)")
        # a child may be called self (BERT's attention.self), which generated code calls the module itself
        name = "self_child" if target == "self" else None
        proxy: ValueProxy = super().create_proxy(kind, target, args, kwargs, name)  # type: ignore[assignment]
        order = next(self.recorder.order)
        self.look()
        proxy.node.meta.update(line=_user_line(self.frame.module), order=order, changes=frozenset())
        self.give_value(proxy.node, value)
        return proxy

    def look(self) -> None:
        """Note whose code is running: all that is called between the frame's forward and here."""
        ran = self.guards.ran
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, whatever its name
        while frame is not None and frame.f_code is not self.recorder.root_code:
            code, held = frame.f_code, frame.f_globals
            if id(code) not in ran and _is_of_model(held.get("__name__")):
                ran[id(code)] = code, held
            frame = frame.f_back

    def give_value(self, node: fx.Node, value: Any) -> None:
        """Make `value`, as it is now, the example value of `node`."""
        came = any(source.meta.get("of_object") for source in node.all_input_nodes) and not isinstance(
            value, Tensor
        )
        # numbers read out of a tensor, of a run on real ones, are no constants of the code, as its sizes are
        read = str(node.target) in _READS_NUMBERS or getattr(node.target, "__name__", "") in _READS_NUMBERS
        node.meta.update(value=value, version=0, of_object=came or read or is_object(value))
        node.meta["child"] = None if isinstance(value, Tensor) else child_of(node)
        if isinstance(value, Tensor):
            node.meta["version"] = value._version
            self._newest[id(value)] = node

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

    def forget(self, node: fx.Node) -> None:
        """Take the call that was recorded last out of the graph."""
        self.graph.erase_node(node)
        self._newest = {key: known for key, known in self._newest.items() if known is not node}

    def parameter(self, module: nn.Module, key: str, value: Tensor) -> ValueProxy:
        """The proxy of a parameter or buffer read by this frame's code."""
        if (path := self.paths.get(id(module))) is None:
            raise TraceFailure(f"reads {key!r} of a module outside of it")
        return self.record("get_attr", f"{path}.{key}" if path else key, (), {}, value)


def _is_of_model(name: str | None) -> bool:
    """Whether code of a Python module is a model's, or of a module of torch's whose forward is called by name."""
    if name is None or not is_foreign(name):
        return True
    return name.startswith("torch.nn.modules.") and name != nn.Module.__module__


def _contexts() -> tuple[bool, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in kinds))


def _user_line(module: nn.Module) -> str:
    """`file.py:123` of the code being traced: the innermost line in the file of the module's class."""
    file = getattr(sys.modules.get(type(module).__module__), "__file__", None)
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, whatever its name
    while file is not None and frame is not None:
        if frame.f_code.co_filename == file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _plain_slices(tree: Any) -> Any:
    """Slices opened up: pytrees treat them as leaves, and `x[:, :n]` may hold a proxy as `n`."""

    def opened(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            parts = (leaf.start, leaf.stop, leaf.step)
            return slice(*(p.value if type(p) is ValueProxy else p for p in parts))
        return leaf

    return tree_map(opened, tree)
