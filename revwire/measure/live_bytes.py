"""A meter of the bytes of all tensors that operators make, for as long as they live."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire._torch import FakeTensor, TorchDispatchMode, active_fake_mode, is_traceable_wrapper_subclass
from revwire.pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class _Counted(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a counted storage, with its key and the bytes it was counted with."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Counts the bytes of the tensors that operators make inside the meter, for as long as they live.

    A storage counts once however many views look at it, from the operator that first returns it until nothing
    refers to it any more. A storage that exists before the meter is entered is never counted, nor are views
    of it. A storage that was resized counts with its new size from the next operator that touches it, or the
    next reading of `live`. Made inside `FakeTensorMode`, the meter counts the storages that the real tensors of
    that mode would have, and none of another mode that is entered meanwhile. Sparse tensors are not counted.

    Attributes:
        peak: Highest number of live bytes after any operator since the meter was made, or since `reset_peak`.

    Example:
        >>> x = torch.ones(256, requires_grad=True)  # 1 KiB, made before: not counted
        >>> with LiveBytes() as meter:
        ...     loss = (2 * x).square().sum()
        >>> meter.live, meter.peak  # 2 * x is saved for backward, and the loss; its square came and went
        (1028, 2052)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._mode = active_fake_mode()
        self._counted: dict[int, _Counted] = {}

    @property
    def live(self) -> int:
        """Bytes counted and alive now; also after the meter is left."""
        for counted in list(self._counted.values()):
            if (storage := counted()) is not None:
                self._recount(counted, storage)
        return self._live

    def counted(self) -> list[Callable[[], torch.UntypedStorage | None]]:
        """Weak references to the storages that are counted now."""
        return list(self._counted.values())

    def reset_peak(self) -> None:
        """Let `peak` start again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two in three operations on fake tensors ask for nothing else
        out = func(*args, **(kwargs or {}))
        # a rewired forward that is called in a new way is traced then and there, in a fake mode of its own
        if func.namespace == "prim" or (self._mode is not None and active_fake_mode() is not self._mode):
            return out
        # torch.tensor(...) hands its fresh tensor to this one operator: it has an argument, yet nothing older
        fresh = func is torch.ops.aten.lift_fresh.default
        given = set() if fresh else {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            counted = self._counted.get(id(storage))
            if counted is not None:
                self._recount(counted, storage)
            elif id(storage) not in given:
                self._count(storage)
        self.peak = max(self.peak, self._live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        counted = _Counted(storage, self._forget)
        # the Python object of a storage lives exactly as long as the storage, so its id is a sound key
        counted.key = id(storage)
        counted.nbytes = storage.nbytes()
        self._counted[counted.key] = counted
        self._live += counted.nbytes

    def _recount(self, counted: _Counted, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._live += nbytes - counted.nbytes
        counted.nbytes = nbytes

    def _forget(self, counted: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(counted, _Counted)
        self._live -= counted.nbytes
        del self._counted[counted.key]


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in `tree`; those inside for a tensor subclass that wraps others."""
    for leaf in tree_leaves(tree):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _storages([getattr(leaf, name) for name in names])
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()
