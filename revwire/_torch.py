"""The one place that names torch's private modules, so that a new torch release is met in one file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, overrides
from torch import _assert as traced_assert
from torch._compile import _disable_dynamo
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as AnyTrackingNorm
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import SUPPORTED_NODES as NODES
from torch.utils._pytree import (
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from torch.utils.checkpoint import _CheckpointFrame as CheckpointFrame

__all__ = [
    "GLOBAL_HOOKS",
    "NODES",
    "AnyBatchNorm",
    "AnyDropout",
    "AnyTrackingNorm",
    "CheckpointFrame",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TreeSpec",
    "active_fake_mode",
    "at_end_of_backward",
    "backward_pass",
    "fake_results_forgotten",
    "float32_precision",
    "function_modes",
    "is_traceable_wrapper_subclass",
    "keeps_graph",
    "memory_of",
    "not_compiled",
    "only_shapes",
    "quiet_fake_tensors",
    "register_pytree_node",
    "scripts_as_written",
    "set_float32_precision",
    "solely_held",
    "swapped_function_modes",
    "traced_assert",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "wraps_others",
]


GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_hooks_always_called,
    _module._global_forward_hooks_with_kwargs,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
"""Hooks of all modules (`register_module_forward_hook`)."""


def function_modes() -> list[object]:
    """The torch function modes that are active in this thread, the outermost first."""
    return list(overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


@contextmanager
def swapped_function_modes(modes: list[object]) -> Iterator[None]:
    """For the length of the block, these modes are active and no others."""
    now = function_modes()
    for _ in now:
        overrides._pop_mode()  # type: ignore[no-untyped-call]
    for mode in modes:
        overrides._push_mode(mode)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for _ in modes:
            overrides._pop_mode()  # type: ignore[no-untyped-call]
        for mode in now:
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]


def float32_precision(backend: str, op: str) -> str:
    """What a backend may compute an op of float32 tensors in: `"ieee"`, `"tf32"`, `"bf16"`, or `"none"`, unsaid."""
    return torch._C._get_fp32_precision_getter(backend, op)


def set_float32_precision(backend: str, op: str, precision: str) -> None:
    """Say what a backend may compute an op of float32 tensors in; the properties of `torch.backends` do the same."""
    torch._C._set_fp32_precision_setter(backend, op, precision)


def scripts_as_written() -> AbstractContextManager[None]:
    """For the length of the block, script modules and functions run as they are written.

    Their compiler saves other tensors for backward once it has seen the shapes: in a second run, not in the first.
    """
    return cast("AbstractContextManager[None]", torch.jit.optimized_execution(False))  # type: ignore[attr-defined]


def active_fake_mode() -> FakeTensorMode | None:
    """The fake mode that operations run in now; entering another one hides it."""
    return cast("FakeTensorMode | None", torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE))


@contextmanager
def fake_results_forgotten() -> Iterator[None]:
    """What operations on fake tensors gave within the block is not remembered after it.

    torch keeps it by shapes for as long as the process lives: memory without end for whoever feeds a model another
    shape in every step.
    """
    before = len(FakeTensorMode.cache)
    try:
        yield
    finally:
        # in the order in which it came; what another thread has added meanwhile it can find out again
        for key in list(FakeTensorMode.cache)[before:]:
            FakeTensorMode.cache.pop(key, None)


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """For the length of the block, fake tensors do not log the traceback of an error that they raise in this thread."""
    logger, thread = logging.getLogger(fake_tensor.__name__), threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(of_others)
    try:
        yield
    finally:
        logger.removeFilter(of_others)


def only_shapes() -> bool:
    """Whether operations run on fake tensors: nothing is computed, and no random number drawn."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


_Function = TypeVar("_Function", bound=Callable[..., object])


def not_compiled(function: _Function) -> _Function:
    """Have torch.compile run `function` as it is. `torch.compiler.disable` would load all of dynamo at import."""
    return cast("_Function", _disable_dynamo(function))


backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the backward pass (autograd's graph task) this thread runs, -1 outside of any."""


def keeps_graph() -> bool:
    """Whether the backward pass this thread runs was asked to `retain_graph`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def at_end_of_backward(callback: Callable[[], object]) -> None:
    """Have `callback()` called when the backward pass this thread runs is done."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[arg-type]


_HELD_HERE = 2
"""The references to a storage that nothing else holds: its tensor's, and that of the object which asks."""


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common, fake ones too."""
    return int(tensor.untyped_storage()._cdata)


def solely_held(tensor: Tensor) -> bool:
    """Whether no other tensor, view, graph or array shares this tensor's memory; says no where that cannot be told."""
    if type(tensor) not in {Tensor, FakeTensor} or 0 in tensor.stride():
        return False
    if tensor._use_count() > 1:  # type: ignore[attr-defined]
        return False
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == _HELD_HERE


def wraps_others(tensor: Tensor) -> bool:
    """Whether a tensor is made of others (DTensor, quantised ones): an operation on it may do more than compute."""
    return bool(is_traceable_wrapper_subclass(tensor))
