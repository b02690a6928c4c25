"""Nested arguments and outputs, flattened to their leaves: torch's pytrees, and dataclasses besides.

Models take and return dataclasses that nobody registered with torch's pytrees. They are opened here on the way in and
made again on the way out, without their `__init__`, so that any dataclass will do. Other objects that may hold tensors
and change (a KV cache) are leaves, and can be copied as they are at one moment (`snapshot`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from revwire import _torch
from revwire._torch import NODES, TreeSpec, register_pytree_node

IsLeaf = Callable[[Any], bool] | None


_CONSTANT = (
    Tensor, nn.Module, type, Enum, functools.partial, torch.Generator, ModuleType,
    FunctionType, MethodType, BuiltinFunctionType,
)  # fmt: skip


def is_object(leaf: object) -> bool:
    """Whether a leaf is an object with a state of its own: neither a tensor nor what stays as it is."""
    return hasattr(leaf, "__dict__") and not isinstance(leaf, _CONSTANT)


def snapshot(value: Any, of_tensor: Callable[[Tensor], Any], memo: dict[int, Any] | None = None) -> Any:
    """A copy of an object's structure as it is now, with `of_tensor` of each tensor in it; constants stay the same."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        return memo.setdefault(id(value), of_tensor(value))
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(snapshot(item, of_tensor, memo) for item in value)
    if isinstance(value, list | dict | set) or is_object(value):
        # containers of any class, with the attributes they may have: nothing of theirs is called but copying
        duplicate = memo[id(value)] = copy.copy(value)
        if isinstance(value, list):
            duplicate[:] = [snapshot(item, of_tensor, memo) for item in value]
        elif isinstance(value, dict):
            duplicate.update({key: snapshot(item, of_tensor, memo) for key, item in value.items()})
        if hasattr(value, "__dict__"):
            duplicate.__dict__.update({k: snapshot(item, of_tensor, memo) for k, item in vars(value).items()})
        return duplicate
    return value


class _Opened:
    """A dataclass instance as a node: its class, and its fields' values."""

    def __init__(self, cls: type, names: tuple[str, ...], values: list[Any]) -> None:
        self.cls, self.names, self.values = cls, names, values

    def closed(self) -> Any:
        """The instance again."""
        instance: Any = object.__new__(self.cls)
        for name, value in zip(self.names, self.values, strict=True):
            object.__setattr__(instance, name, value)  # frozen ones too
        return instance


def _is_opened(value: object) -> bool:
    return isinstance(value, _Opened)


register_pytree_node(
    _Opened,
    lambda opened: (opened.values, (opened.cls, opened.names)),
    lambda values, context: _Opened(context[0], context[1], list(values)),
    serialized_type_name="revwire.Opened",
)


def _is_dataclass(leaf: object) -> bool:
    # asked of the type: a proxy answers for its value
    return hasattr(type(leaf), "__dataclass_fields__")


def _open(tree: Any, is_leaf: IsLeaf) -> Any:
    def opened(leaf: Any) -> Any:
        if not _is_dataclass(leaf) or (is_leaf is not None and is_leaf(leaf)):
            return leaf
        names = tuple(field.name for field in dataclasses.fields(leaf))
        return _Opened(type(leaf), names, [_open(getattr(leaf, name), is_leaf) for name in names])

    return _torch.tree_map(opened, tree, is_leaf=is_leaf)


def _close(tree: Any) -> Any:
    def closed(node: Any) -> Any:
        if not _is_opened(node):
            return node
        node.values = [_close(value) for value in node.values]
        return node.closed()

    return _torch.tree_map(closed, tree, is_leaf=_is_opened)


def tree_flatten(tree: Any, is_leaf: IsLeaf = None) -> tuple[list[Any], TreeSpec]:
    """The leaves of a structure, and what `tree_unflatten` makes it of again."""
    leaves, spec = _torch.tree_flatten(tree, is_leaf)
    if _has_size(tree):
        # torch makes a tuple of a torch.Size that it took apart: the same call would have two structures
        leaves, spec = _torch.tree_flatten(_torch.tree_unflatten(leaves, spec), is_leaf)
    if any(map(_is_dataclass, leaves)):
        return _torch.tree_flatten(_open(tree, is_leaf), is_leaf)
    return leaves, spec


def _has_size(tree: Any) -> bool:
    kind = type(tree)
    if kind is tuple or kind is list:
        return any(map(_has_size, tree))
    return any(map(_has_size, tree.values())) if kind is dict else kind is torch.Size


def tree_leaves(tree: Any, is_leaf: IsLeaf = None) -> list[Any]:
    """The leaves of a structure."""
    kind = type(tree)
    if is_leaf is not None and is_leaf(tree):
        return [tree]
    # called for each operator that is traced and each block that runs: the containers that everyone uses go first
    if kind is tuple or kind is list:
        return [leaf for item in tree for leaf in tree_leaves(item, is_leaf)]
    if kind is dict:
        return [leaf for item in tree.values() for leaf in tree_leaves(item, is_leaf)]
    return tree_flatten(tree, is_leaf)[0] if _holds_others(kind) else [tree]


def tree_unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """The structure of these leaves."""
    return _close(_torch.tree_unflatten(leaves, spec))


def tree_map(function: Callable[[Any], Any], tree: Any, is_leaf: IsLeaf = None) -> Any:
    """A structure with `function` of each leaf in its place."""
    kind = type(tree)
    if is_leaf is not None and is_leaf(tree):
        return function(tree)
    if kind is tuple:
        return tuple([tree_map(function, item, is_leaf) for item in tree])
    if kind is list:
        return [tree_map(function, item, is_leaf) for item in tree]
    if kind is dict:
        return {key: tree_map(function, item, is_leaf) for key, item in tree.items()}
    if not _holds_others(kind):
        return function(tree)
    leaves, spec = tree_flatten(tree, is_leaf)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def _holds_others(kind: type) -> bool:
    return kind in NODES or issubclass(kind, tuple) or hasattr(kind, "__dataclass_fields__")
