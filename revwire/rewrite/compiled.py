"""Branches run by torch.compile: one compilation for all that are structurally equal, however many blocks there are.

torch.compile stores compiled code with the function that it compiled, guarded by the structure of the modules that the
function is given. So branches whose code and modules are alike share one function. Others get one of their own, as
torch.compile gives up on a function that it had to compile for too many kinds. Sizes stay fixed in the compiled code:
if one became dynamic between forward and backward, the second run of a branch would be another one than the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire.find.alike import plain_attributes
from revwire.find.branch_code import StepCode, source_of, step_code
from revwire.libraries.drop import is_drop_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from revwire.find.residual import Residual

_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def compiled_code(residual: Residual) -> StepCode:
    """The branch of a residual as functions of `(self, x, *sides)` that torch.compile runs, all but its drop path."""
    last = _drop_paths(residual)
    code = step_code(residual, without=last)
    module = residual.frame.module
    paths = [str(node.target) for node in last]
    called = tuple(_structure(module.get_submodule(path)) for path in residual.modules if path not in paths)
    own = tuple((path, _shape(_tensor(module, path))) for path in code.own)
    kind = type(module), called, own
    branch = _compiled(code.branch, kind)

    def whole(self: nn.Module, x: torch.Tensor, *sides: Any) -> tuple[Any, ...]:
        out, *shared = branch(self, x, *sides)
        for path in paths:
            out = self.get_submodule(path)(out)
        return (out, *shared)

    post = None if code.post is None else _compiled(code.post, kind)
    return replace(code, branch=whole, post=post)


def _drop_paths(residual: Residual) -> list[fx.Node]:
    """The drop paths that a branch ends with: each block has a rate of its own, and else is like the others."""
    last: list[fx.Node] = []
    terms = residual.terms
    while len(terms) == 1:
        node = terms[0]
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if (
            not alone
            or node in residual.shared
            or not is_drop_path(residual.frame.module.get_submodule(str(node.target)))
        ):
            break
        last.insert(0, node)
        terms = tuple(node.all_input_nodes)
    return last


def _compiled(function: Callable[..., Any], kind: tuple[Any, ...]) -> Callable[..., Any]:
    key = source_of(function), *kind
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(function, dynamic=False)
    return _COMPILED[key]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What torch.compile would guard of a module and its children."""
    tensors = tuple((name, _shape(t)) for name, t in (*module._parameters.items(), *module._buffers.items()))
    children = tuple((name, _structure(child)) for name, child in module.named_children())
    return type(module), plain_attributes(module), tensors, children


def _shape(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _tensor(module: nn.Module, path: str) -> torch.Tensor | None:
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    found: torch.Tensor | None = getattr(owner, name)
    return found
