"""The one place that names torch's private modules, so that a new torch release is met in one file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch import _assert as traced_assert
from torch._compile import _disable_dynamo
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
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
    "is_traceable_wrapper_subclass",
    "keeps_graph",
    "not_compiled",
    "only_shapes",
    "quiet_fake_tensors",
    "register_pytree_node",
    "solely_held",
    "traced_assert",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]


def active_fake_mode() -> FakeTensorMode | None:
    """The fake mode that operations run in now; entering another one hides it."""
    return cast("FakeTensorMode | None", torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE))


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


def backward_pass() -> int:
    """Number of the backward pass (autograd's graph task) this thread runs, -1 outside of any."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Whether the backward pass this thread runs was asked to `retain_graph`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def at_end_of_backward(callback: Callable[[], object]) -> None:
    """Have `callback()` called when the backward pass this thread runs is done."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[arg-type]


_HELD_HERE = 2
"""The references to a storage that nothing else holds: its tensor's, and that of the object which asks."""


def solely_held(tensor: Tensor) -> bool:
    """Whether no other tensor, view, graph or array shares this tensor's memory; says no where that cannot be told."""
    if type(tensor) not in {Tensor, FakeTensor} or 0 in tensor.stride():
        return False
    if tensor._use_count() > 1:  # type: ignore[attr-defined]
        return False
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == _HELD_HERE
