"""Objects that stand in for tensors while a frame's code runs on them, and record what it does with them."""

from __future__ import annotations

import builtins
import operator
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, fx

from revwire.trace.expected import SEEN, unused_targets
from revwire.trace.frame import TraceFailure
from revwire.trace.health import finite, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from revwire.trace.guards import Guards


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


_OF_TENSORS = {"T", "mT", "H", "mH", "real", "imag"}
"""Attributes of tensors that are tensors."""

_PLAIN = (bool, int, float, str, type(None))


class Traces(Protocol):
    """Who builds the graph that proxies take part in."""

    guards: Guards

    def look(self) -> None:
        """Note whose code is running."""

    def called(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The proxy of a call's value, whatever that is."""

    def expect(self, proxy: ValueProxy) -> None:
        """Have the generated code check that a value is what it was when this was traced."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a call and compute its example value."""


class ValueProxy(fx.Proxy):
    """A proxy that knows its example value, so Python code can look at it and go on.

    `isinstance` answers for the value where Python code asks (`answering_isinstance`). torch's C++ code, which asks
    too, is told the truth: it would take a proxy that claims to be a tensor for one, and crash.
    """

    tracer: Traces  # type: ignore[assignment] # fx asks for no more of it than this

    def __init__(self, node: fx.Node, tracer: Traces) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]

    @property
    def value(self) -> Any:
        """The example value this proxy stands for."""
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.value, Tensor):
            if name in _CONCRETE:
                self.tracer.look()
                self.tracer.guards.looked_at.add(_CONCRETE[name])
                return getattr(self.value, name)
            if name in _OF_TENSORS:
                return self.tracer.create_proxy("call_function", getattr, (self, name), {})
            if name in {"requires_grad", "grad_fn", "is_leaf", "grad", "data"}:
                raise TraceFailure(f"reads .{name} of a tensor")
        if not hasattr(self.value, name):
            raise AttributeError(name)
        if self.of_object and isinstance(value := getattr(self.value, name), _PLAIN):
            return self._pinned(name, value)
        if callable(getattr(self.value, name)):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def of_object(self) -> bool:
        """Whether the value is an object with a state, or came out of one."""
        return bool(self.node.meta["of_object"])

    @property
    def of_child(self) -> bool:
        """Whether the value is no tensor, and a child returned it or what it was worked out from."""
        return self.node.meta["child"] is not None

    def _pinned(self, name: str, value: Any) -> Any:
        """A plain attribute of an object: a constant of the graph, which holds for calls that agree on it."""
        names: tuple[str, ...] = (name,)
        node = self.node
        while node.op == "call_function" and node.target is getattr:
            names, node = (str(node.args[1]), *names), node.all_input_nodes[0]
        if node.meta["child"] is not None:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if node.op != "placeholder":
            raise TraceFailure(f"reads {name!r} of what an object returned")
        self.tracer.guards.attributes[int(str(node.target)[len("input_") :]), names] = value
        return value

    def _concrete(self) -> Any:
        self.tracer.look()
        if isinstance(self.value, Tensor):
            raise TraceFailure("decides by the numbers in a tensor")
        if self.of_child and isinstance(self.value, SEEN):
            self.tracer.expect(self)
        elif self.of_object:
            raise TraceFailure(f"decides by what an object returned ({self.node.name})")
        # a flag (`is_floating_point`) may tell of more than the shape
        self.tracer.guards.looked_at.update({"shape", "dtype"} if isinstance(self.value, bool) else {"shape"})
        return self.value

    def __bool__(self) -> bool:
        checked: set[fx.Node] = set()
        # only of a tensor: what is decided by a shape is a constant of the graph
        if isinstance(self.value, Tensor) and (healthy := outcome(self.node, checked)) is not None:
            for node in sorted(checked, key=lambda node: int(node.meta["order"])):
                line = self.node.meta["line"]
                self.tracer.create_proxy("call_function", finite, (ValueProxy(node, self.tracer), line), {})
            return healthy
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
        if self.of_child and isinstance(self.value, tuple | list | dict):
            return int(self.tracer.create_proxy("call_function", len, (self,), {}))
        if self.of_object and not isinstance(self.value, tuple):
            raise TraceFailure(f"decides by what an object returned ({self.node.name})")
        if isinstance(self.value, Tensor):
            self.tracer.guards.looked_at.add("shape")
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.keys())
        if not self.of_child or not isinstance(self.value, tuple | list):
            return (self[i] for i in range(len(self)))  # type: ignore[index]
        # what nobody reads may be another thing at each call
        unused = unused_targets(sys._getframe(1))  # noqa: SLF001 - documented, whatever its name
        return (
            (self.tracer.called if i in unused else self.tracer.create_proxy)(
                "call_function", operator.getitem, (self, i), {}
            )
            for i in range(len(self.value))
        )

    def __contains__(self, item: object) -> bool:
        if isinstance(self.value, Tensor):
            raise TraceFailure("decides by the numbers in a tensor")
        if self.of_child and isinstance(self.value, dict | list | tuple):
            return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))
        return item in (self.value if isinstance(self.value, dict) else self._concrete())

    def __str__(self) -> str:
        return str(self._concrete()) if isinstance(self.value, _PLAIN) else repr(self)

    def __format__(self, spec: str) -> str:
        return format(self._concrete(), spec) if isinstance(self.value, _PLAIN) else repr(self)

    def keys(self) -> Any:
        """Keys of a proxied dict, so that `**proxy` works."""
        if self.of_child:
            for key in self.value:
                bool(key in self)
        return self.value.keys()

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, key, item), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueProxy:
        return self


@contextmanager
def answering_isinstance() -> Iterator[None]:
    """For the length of the block, `isinstance(proxy, kinds)` holds where it holds for the proxy's value."""
    original = builtins.isinstance

    def answer(thing: Any, kinds: Any) -> bool:
        if type(thing) is ValueProxy and original(thing.value, kinds):
            return True
        return original(thing, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = original


def _inplace_operator(name: str) -> Callable[[ValueProxy, Any], Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _INPLACE:
    setattr(ValueProxy, f"__{_name}__", _inplace_operator(_name))


def set_item(target: Any, key: Any, item: Any) -> Any:
    """`target[key] = item` as a function of what it changes: in a graph, what comes after depends on it."""
    target[key] = item
    return target


def updated(tensor: Tensor, *_changes: Any) -> Tensor:
    """`tensor` after it was changed in place through other names (its views), which `_changes` did."""
    return tensor
