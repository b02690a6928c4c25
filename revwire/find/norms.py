"""Normalisations of a trunk: modules, torch's functions, and such as code writes out (RMSNorm)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from revwire.libraries.noise import Noise
from revwire.trace.operation import function_of, name_of

if TYPE_CHECKING:
    from revwire.trace.frame import Frame

_FUNCTIONS = {functional.layer_norm, functional.group_norm, functional.rms_norm, functional.normalize}
"""Those that look at a sample alone and move nothing."""
_LONGEST, _LARGEST = 16, 2**22
"""Operations that a norm is written out with, and numbers in a tensor that one is tried on, at most."""


def is_norm(frame: Frame, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is a norm on `source` that keeps the shape: a module of that name, or a function of torch's."""
    value = node.meta.get("value")
    if not isinstance(value, Tensor) or value.shape != source.meta["value"].shape:
        return False
    if node.op == "call_module":
        named = "norm" in type(frame.module.get_submodule(str(node.target))).__name__.lower()
        return named and node.all_input_nodes == [source]
    # its weights are the frame's own
    others = [each for each in node.all_input_nodes if each is not source]
    of_source = bool(node.args) and node.args[0] is source and all(each.op == "get_attr" for each in others)
    return node.target in _FUNCTIONS and of_source


def norm_by_hand(source: fx.Node) -> tuple[fx.Node, ...]:
    """The operations on `source`, and on nothing else that the frame computes, that together are a norm of it.

    Proven by trying: the result is the same for a `source` of another scale.
    """
    given = source.meta["value"]
    # of one number nothing can be told
    if not given.is_floating_point() or not 1 < given.numel() <= _LARGEST:
        return ()
    group: list[fx.Node] = []
    node = source.next
    while node.op != "output" and len(group) < _LONGEST:
        inputs = node.all_input_nodes
        if {source, *group}.intersection(inputs):
            own = all(each is source or each in group or each.op == "get_attr" for each in inputs)
            if not own or node.op == "call_module" or node.meta.get("changes"):
                return ()
            group.append(node)
            if _is_closed(source, group) and _is_of_any_scale(source, group):
                return tuple(_with_scale(group))
        node = node.next
    return ()


def _is_closed(source: fx.Node, group: list[fx.Node]) -> bool:
    """Whether the last of some operations on `source` is alike, and all that goes on from them."""
    value, given = group[-1].meta.get("value"), source.meta["value"]
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (given.shape, given.dtype):
        return False
    return all(set(group).issuperset(each.users) for each in (source, *group[:-1]))


def _with_scale(group: list[fx.Node]) -> list[fx.Node]:
    """A norm, and what multiplies it by the frame's own weights or adds them."""
    end = group[-1]
    while len(end.users) == 1:
        (user,) = end.users
        value, others = user.meta.get("value"), [each for each in user.all_input_nodes if each is not end]
        plain = name_of(user).strip("_") in {"mul", "add"}
        own = bool(others) and all(each.op == "get_attr" for each in others)
        if not (plain and own and isinstance(value, Tensor) and value.shape == end.meta["value"].shape):
            break
        group.append(user)
        end = user
    return group


@torch.no_grad()
def _is_of_any_scale(source: fx.Node, group: list[fx.Node]) -> bool:
    noise = Noise()
    sample = noise.normal(source.meta["value"].shape, torch.float64)
    weights = {
        each: 1 + 0.1 * noise.normal(each.meta["value"].shape, torch.float64)
        for node in group
        for each in node.all_input_nodes
        if each.op == "get_attr"
    }
    try:
        one, other = (_run(group, {**weights, source: scale * sample}) for scale in (1.0, 5.0))
    except Exception:  # noqa: BLE001 - what does not run on plain tensors is no norm
        return False
    varies = isinstance(one, Tensor) and float(one.std()) > 0.1
    return varies and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-3))


def _run(group: list[fx.Node], values: dict[fx.Node, Any]) -> Any:
    for node in group:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = function_of(node)(*args, **kwargs)
    return values[group[-1]]
