"""What a branch depends on beside its modules and its arguments: random numbers, autocast, the kernels allowed."""

from __future__ import annotations

import random
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda as sdp

from revwire._torch import float32_precision, only_shapes, set_float32_precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import ExitStack

    from torch import nn


KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (sdp.flash_sdp_enabled, sdp.enable_flash_sdp),
    (sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp),
    (sdp.math_sdp_enabled, sdp.enable_math_sdp),
    (sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp),
)


_ALLOWED = tuple(allowed for allowed, _ in KERNELS)


def kernels() -> tuple[bool, ...]:
    """Which of them may be used now."""
    flash, efficient, math, cudnn = _ALLOWED
    return flash(), efficient(), math(), cudnn()


_PRODUCTS = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_EPSILON = {"tf32": 2.0**-10, "bf16": 2.0**-7}


class Float32(NamedTuple):
    """What products of float32 tensors may be computed in; of convolutions on CUDA that is tf32 unless one says other.

    Attributes:
        of_matmul: What `torch.get_float32_matmul_precision` says; None where torch refuses to, because somebody has set
            `torch.backends.*.fp32_precision`.
        of_each: Of each backend and operation.
    """

    of_matmul: str | None
    of_each: tuple[str, ...]

    @classmethod
    def now(cls) -> Float32:
        """As it is."""
        try:
            of_matmul = torch.get_float32_matmul_precision()
        except RuntimeError:
            of_matmul = None
        return cls(of_matmul, tuple([float32_precision(*product) for product in _PRODUCTS]))

    def epsilon(self, device: torch.device) -> float:
        """The precision that this leaves to float32 on a device."""
        own = self.of_each[3:] if device.type in {"cpu", "meta"} else self.of_each[:3]
        return max((_EPSILON[each] for each in own if each in _EPSILON), default=0.0)

    def put_back(self, stack: ExitStack) -> None:
        """Have it so until the end of a stack."""
        now = Float32.now()
        if self.of_matmul != now.of_matmul and self.of_matmul and now.of_matmul:
            torch.set_float32_matmul_precision(self.of_matmul)
            stack.callback(torch.set_float32_matmul_precision, now.of_matmul)
        for product, wanted in zip(_PRODUCTS, self.of_each, strict=True):
            if (other := float32_precision(*product)) != wanted:
                set_float32_precision(*product, wanted)
                stack.callback(set_float32_precision, *product, other)


def is_capturing() -> bool:
    """Whether what is issued now goes into a CUDA graph: nothing is computed yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


@contextmanager
def no_weight_cache() -> Iterator[None]:
    """For the length of the block, autocast does not hold on to the weights that it casts.

    It would until the end of the forward: a copy of all weights, for steps that keep nothing else.
    """
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


@dataclass(slots=True)
class RandomState:
    """One generator's state, with the functions that read and write it."""

    get: Callable[[], Any]
    put: Callable[[Any], object]
    state: Any

    @classmethod
    def now(cls, get: Callable[[], Any], put: Callable[[Any], object]) -> RandomState:
        """The state as it is."""
        return cls(get, put, get())

    def moved(self) -> bool:
        """Whether numbers were drawn since."""
        now = self.get()
        return not _equal(now, self.state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The block draws the same numbers again; afterwards the generator is where it was before the block."""
        now = self.get()
        self.put(self.state)
        try:
            yield
        finally:
            self.put(now)


def _equal(one: Any, other: Any) -> bool:
    """Whether two states are the same; numpy's are dicts and tuples with arrays in them."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and len(one) < 10:
        return all(map(_equal, one, other))
    found = one == other
    return bool(found.all()) if hasattr(found, "all") else bool(found)


def torch_states(device: torch.device) -> list[RandomState]:
    """The states of torch's own generators that a branch may draw from, the CPU's and the device's."""
    if only_shapes():
        return []
    states = [RandomState.now(torch.get_rng_state, torch.set_rng_state)]
    if device.type not in {"cpu", "meta"}:
        module: Any = torch.get_device_module(device)
        states.append(
            RandomState.now(
                lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)
            )
        )
    return states


def imported_generators(modules: Iterable[nn.Module]) -> list[Any]:
    """The generators of Python and numpy that the code of modules may draw from.

    Reading these takes longer than the rest of a small branch, so they are those that the source files of the modules'
    classes know.
    """
    return [generator for kind in {type(module) for module in modules} for generator in _generators_of(kind)]


_OF_CLASS: weakref.WeakKeyDictionary[type, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_NEAR = 2
"""From a class's own source file, in how many steps of functions that it imports a generator is looked for."""


def _generators_of(cls: type) -> tuple[Any, ...]:
    """The generators that the source files of a class, and of functions that they import, can draw from."""
    if cls not in _OF_CLASS:
        found: dict[int, Any] = {}
        seen = set[str]()
        for base in cls.__mro__:
            _look_into(base.__module__, found, seen, _NEAR)
        _OF_CLASS[cls] = tuple(found.values())
    return _OF_CLASS[cls]


def _look_into(name: str, found: dict[int, Any], seen: set[str], steps: int) -> None:
    if name in seen or name.partition(".")[0] in {"torch", "builtins"} or name not in sys.modules:
        return
    seen.add(name)
    for value in list(vars(sys.modules[name]).values()):
        for generator in _drawn_from(value):
            found[id(generator)] = generator
        if steps and isinstance(value, FunctionType) and value.__module__:
            _look_into(value.__module__, found, seen, steps - 1)


def _drawn_from(value: Any) -> list[Any]:
    """The generators that a global name leads to: itself, a module's, a function's (`from random import ...`)."""
    numpy = sys.modules.get("numpy")
    own: Any = getattr(random, "_inst")  # noqa: B009 - what the functions of the module are methods of
    if value is random:
        return [own]
    if numpy is not None and (value is numpy or value is numpy.random):
        return [numpy.random.mtrand._rand]  # noqa: SLF001 - numpy has no other name for it
    if isinstance(value, BuiltinFunctionType | MethodType):
        value = value.__self__
    return [value] if is_generator(value) else []


def is_generator(value: object) -> bool:
    """Whether a value is a random generator of torch's, Python's or numpy's."""
    kinds: tuple[Any, ...] = (torch.Generator, random.Random)
    if (numpy := sys.modules.get("numpy")) is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, kinds)


def random_state(value: Any) -> RandomState:
    """The state of a random generator."""
    if isinstance(value, torch.Generator):
        return RandomState.now(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return RandomState.now(value.getstate, value.setstate)
    if hasattr(value, "bit_generator"):
        bits = value.bit_generator
        return RandomState.now(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return RandomState.now(value.get_state, value.set_state)


_HOST = {torch.device("cpu"), torch.device("meta")}


def autocast_now(device: torch.device) -> tuple[tuple[str, torch.dtype, bool], ...]:
    """Autocast as it is now, for each kind of device concerned: the kind, its dtype, whether it is on."""
    on_cpu = "cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    if device in _HOST:  # asking for its type takes longer than the rest
        return (on_cpu,)
    kind = device.type
    return on_cpu, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def as_autocast(state: tuple[tuple[str, torch.dtype, bool], ...]) -> Iterator[torch.autocast]:
    """The contexts that make autocast what it was."""
    cached = torch.is_autocast_cache_enabled()
    for kind, dtype, enabled in state:
        yield torch.autocast(kind, dtype, enabled, cache_enabled=cached)
