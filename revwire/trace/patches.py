"""Replacements for functions of torch while a model is recorded; the originals are put back afterwards."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revwire._torch import CheckpointFrame, fake_results_forgotten
from revwire.pytree import tree_leaves
from revwire.trace.code import Bypass
from revwire.trace.frame import TraceFailure
from revwire.trace.proxy import ValueProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from revwire.trace.tracer import FrameTracer


class _OneAtATime:
    """A lock that a thread may take several times over; nothing is left in torch's caches when it is free again."""

    def __init__(self) -> None:
        self._free()
        if hasattr(os, "register_at_fork"):
            # a process that was forked while another thread traced would wait for it for ever
            os.register_at_fork(after_in_child=self._free)

    def _free(self) -> None:
        if getattr(self, "_owner", None) != get_ident():
            self._lock, self._owner = threading.RLock(), 0
            self._within: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = get_ident()
        self._within.append(nullcontext() if self._within else fake_results_forgotten())
        self._within[-1].__enter__()

    def __exit__(self, *_: object) -> None:
        try:
            self._within.pop().__exit__(None, None, None)
        finally:
            self._owner = get_ident() if self._within else 0
            self._lock.release()


TRACING = _OneAtATime()
"""One at a time plans, rewires or traces: what is patched meanwhile is patched in one place for all threads."""


_Function = TypeVar("_Function", bound="Callable[..., Any]")


def one_at_a_time(function: _Function) -> _Function:
    """`function`, which one thread runs at a time, and no other traces meanwhile."""

    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with TRACING:
            return function(*args, **kwargs)

    return cast("_Function", locked)


class Records(Protocol):
    """Who takes down what a model runs."""

    tracing: FrameTracer | None
    modes: dict[int, bool]

    def stand_in(self, tensor: Tensor) -> Tensor:
        """What a module's own tensor is for the code that is recorded."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `nn.Module.__call__` becomes."""

    def compute(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function` on example values."""


class FunctionsRecorded(TorchFunctionMode):
    """Sends every torch function to the frame being traced, factory functions without tensors included."""

    def __init__(self, recorder: Records) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.recorder.tracing
        if tracer is None:
            return self.recorder.compute(func, args, kwargs)
        name = getattr(func, "__name__", "")
        kind, target = (
            ("call_method", name) if getattr(Tensor, name, None) is func else ("call_function", func)
        )
        if any(type(leaf) is ValueProxy for leaf in tree_leaves((args, kwargs))):
            return tracer.create_proxy(kind, target, args, kwargs)
        value = self.recorder.compute(func, args, kwargs)
        made = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        return tracer.record(kind, target, args, kwargs, value) if made else value


class _Modes:
    """`module.training` as the thread that records is to find it; others find it as it is."""

    def __init__(self, recorder: Records) -> None:
        self._recorder, self._thread = recorder, get_ident()

    def __get__(self, module: nn.Module | None, owner: Any) -> Any:
        if module is None:
            raise AttributeError("training")
        if get_ident() == self._thread and id(module) in self._recorder.modes:
            return self._recorder.modes[id(module)]
        held = module.__dict__
        # a script module holds it elsewhere
        return held["training"] if "training" in held else owner.__getattr__(module, "training")

    def __set__(self, module: nn.Module, training: bool) -> None:
        if get_ident() != self._thread:
            module.__dict__["training"] = training
            return
        if self._recorder.tracing is not None and "training" in module.__dict__:  # else it is being made
            raise TraceFailure("sets the mode of a module (train(), eval()) in forward")
        if id(module) in self._recorder.modes:
            self._recorder.modes[id(module)] = training
        else:
            module.__dict__["training"] = training


@contextmanager
def patched_modes(recorder: Records, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules are in the mode that `recorder` wants, for this thread: others may be running the same model."""
    scripted = [(m, m.training) for m in modules if isinstance(m, torch.jit.ScriptModule)]
    for module, _ in scripted:  # their code asks nobody
        module.training = recorder.modes.pop(id(module), module.training)
    cls: Any = nn.Module
    outer = vars(cls).get("training")
    cls.training = _Modes(recorder)
    try:
        yield
    finally:
        if outer is None:
            del cls.training
        else:
            cls.training = outer
        for module, training in scripted:
            module.training = training


class _ThisThread:
    """In the place of a pattern of messages: matches all, of one thread."""

    def __init__(self) -> None:
        self._thread = get_ident()

    def match(self, _: str) -> bool:
        """Whether the thread that asks is the one."""
        return get_ident() == self._thread


@contextmanager
def silent() -> Iterator[None]:
    """For the length of the block, this thread's warnings are ignored, and no other's."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment] # another thread may put its own list there
    ours = ("ignore", _ThisThread(), Warning, None, 0)
    filters.insert(0, ours)
    try:
        yield
    finally:
        filters.remove(ours)


@contextmanager
def patched_modules(recorder: Records) -> Iterator[None]:
    """Module calls and reads of parameters go through `recorder`."""
    call, getattribute, thread = nn.Module.__call__, nn.Module.__getattr__, get_ident()

    def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return call(module, *args, **kwargs)
        return recorder.call(module, args, kwargs)

    def patched_getattr(module: nn.Module, key: str) -> Any:
        value = getattribute(module, key)
        if get_ident() != thread or not isinstance(value, Tensor):
            return value
        # handed out, not put into the module: other threads may be running it
        value = recorder.stand_in(value)
        return value if recorder.tracing is None else recorder.tracing.parameter(module, key, value)

    nn.Module.__call__, nn.Module.__getattr__ = patched_call, patched_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattribute  # type: ignore[method-assign]


class _Sized(Bypass):
    """In the place of a factory function: takes sizes one by one that are read off a tensor, too.

    torch's own parser would not look for them there: `torch.zeros(batch, tokens, 1)`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor."""
        if self._is_mine() and any(type(size) is ValueProxy for size in args):
            return self.cached(args, **kwargs)
        return self.cached(*args, **kwargs)


_SIZED = ("zeros", "ones", "empty", "rand", "randn")


@contextmanager
def patched_factories() -> Iterator[None]:
    """`torch.zeros` and the like take sizes that a frame's code reads off its tensors."""
    originals = {name: getattr(torch, name) for name in _SIZED}
    for name, function in originals.items():
        setattr(torch, name, _Sized(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextmanager
def patched_functions(recorder: Records) -> Iterator[None]:
    """What a frame's own code must not call: it cannot be recorded, and hands proxies to C++ code."""
    apply, start = torch.autograd.Function.__dict__["apply"], CheckpointFrame.__init__
    thread = get_ident()

    def patched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.tracing is not None and get_ident() == thread:
            # a custom autograd.Function would dissolve into its forward
            raise TraceFailure(
                f"calls the autograd.Function {cls.__name__} itself; in a module of its own it is fine"
            )
        return apply.__get__(None, cls)(*args, **kwargs)

    def patched_start(*args: Any, **kwargs: Any) -> None:
        if recorder.tracing is not None and get_ident() == thread:
            raise TraceFailure(
                "calls torch.utils.checkpoint itself; a rewired chain does without, so turn it off"
            )
        start(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(patched)
    CheckpointFrame.__init__ = patched_start  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply
        CheckpointFrame.__init__ = start  # type: ignore[method-assign]
