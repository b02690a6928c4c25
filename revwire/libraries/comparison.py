"""Compares a model without weights (an outline) with the tensors of a state dict, or with another model."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.printing import first_few

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Shapes = dict[str, tuple[int, ...]]

_NAMED = 3  # how many faults of each kind a message names; the rest is counted
# Settings that only training looks at.
_TRAINING = frozenset({"training", "p", "momentum", "inplace"})


def shapes_of(module: nn.Module) -> Shapes:
    """Names and shapes of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def counted(shapes: Shapes) -> Shapes:
    """Without the batch counters of BatchNorm, which old checkpoints lack."""
    return {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def difference(outline: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The first few differences between a model and a state dict, in words; empty where it fits.

    A name may be missing where the model ties it to one that is there (safetensors stores tied tensors once),
    and so may a BatchNorm's batch counter, which old checkpoints lack and torch starts from 0.

    Args:
        outline: The model, on any device.
        tensors: The state dict.
    """
    wanted = outline.state_dict(keep_vars=True)
    ties = defaultdict(set)
    for name, tensor in wanted.items():
        ties[id(tensor)].add(name)
    missing = [
        f"{name} ({shape_of(tensor)})"
        for name, tensor in wanted.items()
        if ties[id(tensor)].isdisjoint(tensors) and not name.endswith("num_batches_tracked")
    ]
    unknown = [f"{name} ({shape_of(tensor)})" for name, tensor in tensors.items() if name not in wanted]
    other = [
        f"{name} (found {shape_of(tensor)}, wanted {shape_of(wanted[name])})"
        for name, tensor in tensors.items()
        if name in wanted and _kind(tensor) != _kind(wanted[name])
    ]
    return faults(missing, unknown, other)


def faults(missing: Iterable[str], unknown: Iterable[str], other: Iterable[str]) -> str:
    """Tensors that are missing, not known, and of another shape, in words; the first few, the rest counted."""
    kinds = {"missing": missing, "not in the architecture": unknown, "of another shape": other}
    return "; ".join(
        f"{kind}: {first_few(names, _NAMED)}" for kind, each in kinds.items() if (names := list(each))
    )


def sizes(shape: Sequence[int]) -> str:
    """`1x197x48`."""
    return "x".join(map(str, shape)) or "scalar"


def shape_of(tensor: Tensor) -> str:
    """`1x197x48`; the dtype too where it is not the usual floating one."""
    shape = sizes(tensor.shape)
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _kind(tensor: Tensor) -> tuple[torch.Size, bool, bool]:
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def differences(model: nn.Module, outline: nn.Module, *, settings: bool = False) -> Iterator[str]:
    """How a model differs from the outline of what it is said to be, one difference at a time.

    Args:
        model: The model at hand.
        outline: What the architecture builds.
        settings: Compare numbers and names kept on the modules too (heads, window, eps), but for those that
            training recipes change (drop rates, BatchNorm's momentum).

    Yields:
        One difference in words.
    """
    found, wanted = shapes_of(model), shapes_of(outline)
    for key in dict.fromkeys([*wanted, *found]):
        if found.get(key) != wanted.get(key):
            yield f"{key} is {found.get(key, 'missing')}, not {wanted.get(key, 'missing')}"
    if not settings:
        return
    modules = dict(model.named_modules())
    for path, reference in outline.named_modules():
        here = modules.get(path)
        if not isinstance(here, type(reference)):
            yield f"{path or 'the model'} is a {type(here).__name__}, not a {type(reference).__name__}"
            continue
        for key, value in vars(reference).items():
            if _is_setting(key, value) and vars(here).get(key) != value:
                yield f"{path}.{key} is {vars(here).get(key)}, not {value}"


def _is_setting(key: str, value: Any) -> bool:
    plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return plain and not key.startswith("_") and key not in ("p", "momentum") and "drop" not in key


def settings(outline: nn.Module) -> dict[str, Any]:
    """What beside its tensors decides the function of a model, by module: kinds, numbers, names, further buffers.

    Left out is what only training or a fresh start looks at. Where two models differ in anything else they are taken
    for two functions, whether or not it matters.
    """
    found: dict[str, Any] = {}
    for path, module in outline.named_modules():
        found[path] = (
            type(module),
            {
                key: value
                for key, each in vars(module).items()
                if not key.startswith(("_", "init", "grad_")) and key not in _TRAINING and "drop" not in key
                if (value := _plain(each)) is not None
            },
        )
        found.update({f"{path}.{key}": tuple(b.shape) for key, b in module.named_buffers(recurse=False)})
    return found


def _plain(value: Any) -> Any:
    """A setting as something to compare; None for what is no setting."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)  # True is no 1
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, functools.partial):
        return [_plain(value.func), sorted((key, _plain(each)) for key, each in value.keywords.items())]
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return None
