"""One call of one module, as a recorded run saw it: its graph, and what the graph depends on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from revwire.pytree import tree_leaves
from revwire.trace.guards import Guards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, fx, nn

    from revwire._torch import TreeSpec


class TraceFailure(Exception):
    """A frame does something that a graph of it would not reproduce. Its message completes "the frame ..."."""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or "no message").splitlines()[0]


Identity = tuple[int, int]
"""A tensor as it was at one moment: the object and its in-place version."""


def identity(value: Any) -> Identity:
    """What tells two traced values apart: the tensor object and how often it was changed in place."""
    return id(value), value._version


@dataclass
class Frame:
    """One call of one module during a recorded run.

    Attributes:
        path: The module's path in the model.
        module: The module.
        graph: The frame's graph, or None with `failure` saying why there is none.
        guards: What the graph depends on.
        arguments: The leaves' names in the signature of `forward`.
        output: How the graph's leaves make up what the frame returns; None for one value or a tuple of values.
        parent: The frame that called this one, and `caller` the node of its graph that did.
    """

    path: str
    module: nn.Module
    graph: fx.Graph | None = None
    failure: str | None = None
    guards: Guards = field(default_factory=Guards)
    arguments: tuple[str, ...] = ()
    output: TreeSpec | None = None
    parent: Frame | None = None
    caller: fx.Node | None = None

    @property
    def callers(self) -> Iterator[fx.Node]:
        """The nodes of the calls that this one runs in, the nearest first."""
        around: Frame | None = self
        while around is not None and around.caller is not None:
            yield around.caller
            around = around.parent

    def label(self, node: fx.Node) -> str:
        """What the author of the frame calls a node: the argument's name, or the node's own."""
        return (
            self.arguments[int(str(node.target)[len("input_") :])] if node.op == "placeholder" else node.name
        )


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as its author wrote it, also where revwire has put another in its place."""
    written = getattr(type(module), "revwire_original", None)
    if written is None or "forward" in module.__dict__:
        return module.forward
    bound: Callable[..., Any] = written.forward.__get__(module)
    return bound


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch's own without children: an operation, nothing to look into."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def storage(tensor: Tensor) -> int:
    """What a tensor and its views have in common."""
    base = tensor._base
    return id(tensor if base is None else base)


def argument_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """For each leaf of `(args, kwargs)`, the parameter of `forward` that receives it."""
    bound = inspect.signature(original_forward(module)).bind(*args, **kwargs)
    names = {id(value): name for name, value in bound.arguments.items()}
    for name, value in bound.arguments.items():
        if isinstance(value, tuple | dict):
            names.update((id(v), name) for v in (value.values() if isinstance(value, dict) else value))
    return tuple(
        names.get(id(top), "?") for top in (*args, *kwargs.values()) for _ in range(len(tree_leaves(top)))
    )
