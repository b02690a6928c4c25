"""What a traced frame looked at to decide what to run. Its graph is used only for calls that agree on all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from revwire.pytree import is_object
from revwire.run.travelling import Travelling
from revwire.trace.reads import Reads
from revwire.trace.same import same

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType

    from revwire._torch import TreeSpec


class _Marker:
    """The type of `TENSOR`."""

    def __repr__(self) -> str:
        return "a tensor"


TENSOR = _Marker()
"""Marks the place of a tensor among the constants a frame was called with."""


@dataclass(frozen=True)
class ObjectOf:
    """Marks the place of an object with a state of its own (a KV cache): any of its class may come there."""

    cls: type


def is_tensor(value: object) -> bool:
    """Whether code that takes a tensor takes this value for one."""
    return isinstance(value, Tensor | Travelling)


def constant_for(leaf: Any) -> Any:
    """What a call is compared by at the place of an argument: the argument itself where it is a constant."""
    return TENSOR if is_tensor(leaf) else ObjectOf(type(leaf)) if is_object(leaf) else leaf


def is_input(leaf: Any) -> bool:
    """Whether an argument is handed to the graph at each call, and no constant in it."""
    return is_tensor(leaf) or is_object(leaf)


@dataclass(frozen=True)
class Inlined:
    """A child whose code was traced as part of its caller's frame.

    Attributes:
        path: Where it is, below the frame's module.
        cls: Its class, whose forward was traced.
    """

    path: str
    cls: type[nn.Module]

    def agrees(self, module: nn.Module) -> bool:
        """Whether the child of `module` at this path would still run the code that was traced."""
        child = module.get_submodule(self.path)
        return type(child) is self.cls and may_inline(child)


def may_inline(module: nn.Module) -> bool:
    """Whether a module's forward is its class's and nobody watches its calls."""
    held = module.__dict__
    hooked = any(
        held[key]
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return not hooked and "forward" not in held and not hasattr(type(module), "revwire_original")


@dataclass
class Guards:
    """What a traced frame depends on: how it was called, and what its code looked at.

    Attributes:
        spec: Structure of `(args, kwargs)`.
        constants: The leaves of that structure, with `TENSOR` for tensors.
        looked_at: What the code, or who read the graph, looked at of the input tensors: any of `"shape"`, `"dtype"`,
            `"device"`.
        reads: What the code reads beside its arguments.
        expected: Paths of children that returned a None, a flag or a word which the code saw; what they read counts.
        attributes: Attributes that the code read of objects it was given: (leaf, names) to the value.
        unread: Of children, by path, the tensors they are given and read no values of, by their leaves.
        inlined: Children whose code is part of the frame's graph, by path.
        ran: Code that was seen to run, by its id, with its globals.
    """

    spec: TreeSpec | None = None
    constants: tuple[Any, ...] = ()
    looked_at: set[str] = field(default_factory=set)
    reads: Reads | None = None
    expected: set[str] = field(default_factory=set)
    attributes: dict[tuple[int, tuple[str, ...]], Any] = field(default_factory=dict)
    unread: dict[str, frozenset[int]] = field(default_factory=dict)
    inlined: dict[str, Inlined] = field(default_factory=dict)
    ran: dict[int, tuple[CodeType, dict[str, Any]]] = field(default_factory=dict)
    _properties: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def note_reads(self, module: nn.Module, caches: dict[Any, Any]) -> None:
        """Note what the code that ran reads of `module` and around it, as it is now, but for its caches."""
        self.reads = Reads(module, self.ran.values(), sorted({*self.inlined, *self.expected}), caches)

    def seal(self, leaves: Sequence[Any]) -> None:
        """Note what the frame's code saw of these input leaves, when it has run."""
        self._properties = {key: _properties(key, leaves) for key in ("shape", "dtype", "device")}

    def hold(self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> bool:
        """Whether a call of `module` with these argument leaves runs the code that was traced."""
        if len(leaves) != len(self.constants) or spec != self.spec:
            return False
        for leaf, constant in zip(leaves, self.constants, strict=True):
            found = constant_for(leaf)
            if found is not constant and not same(found, constant):
                return False
        if any(not same(_read(leaves[i], names), value) for (i, names), value in self.attributes.items()):
            return False
        if any(_properties(key, leaves) != self._properties[key] for key in self.looked_at):
            return False
        return self.reads_the_same(module)

    def reads_the_same(self, module: nn.Module) -> bool:
        """Whether the code that was traced reads of `module`, and around it, what it read then."""
        if self.reads is not None and not self.reads.hold(module):
            return False
        return not self.inlined or all(child.agrees(module) for child in self.inlined.values())


def _read(leaf: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        leaf = getattr(leaf, name, None)
    return leaf


def _properties(key: str, leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, key) for leaf in leaves if is_tensor(leaf))
