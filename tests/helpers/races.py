"""Two device streams on a CPU, and who of them touches which memory without having waited for the other.

Operations run one after the other, as they are issued; what a device would be free to run at the same time, or in
another order, is told by vector clocks: an operation of one stream comes after one of another only if an event says so.
"""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Stream:
    """A queue of operations: the latest operation of each stream that this one's next will come after."""

    device: object = None
    clock: Counter = field(default_factory=Counter)
    deaf: bool = False
    """Does not wait, as if the call was forgotten."""

    def record_event(self):
        return Counter(self.clock)

    def wait_event(self, event):
        if not self.deaf:
            self.clock |= event

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Device:
    """Stands in for `torch.cuda`."""

    Stream = Stream

    def __init__(self):
        self.now = self.main = Stream()

    def current_stream(self, device=None):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before


@dataclass
class Memory:
    """A block: the stream whose pool it is from, and its last write and reads by stream."""

    pool: Stream
    write: tuple[Stream, int]
    reads: Counter = field(default_factory=Counter)

    def uses(self):
        return [self.write, *self.reads.items()]


class Races(TorchDispatchMode):
    """Collects in `found` what is touched too early, and blocks that are given away while they are used."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found, self.on_side = device, [], 0
        self._known: dict[int, Memory] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._freed: list[Memory] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        now = self.device.now
        out = func(*args, **kwargs)
        now.clock[now] += 1
        self.on_side += now is not self.device.main
        written = set()
        for given, argument in zip(func._schema.arguments, args, strict=False):
            if given.alias_info is not None and given.alias_info.is_write:
                written |= {id(t.untyped_storage()) for t in tensors(argument)}
        for tensor in tensors((args, kwargs)):
            memory = self._memory(tensor, self.device.main, 0)
            self._check(func, memory, now, wrote=id(tensor.untyped_storage()) in written)
        for tensor in tensors(out):
            if id(tensor.untyped_storage()) not in self._known:
                self._allocated(func, now)
                self._memory(tensor, now, now.clock[now])
        return out

    def _memory(self, tensor, pool, tick):
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            self._known[key] = Memory(pool, (pool, tick))
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
        return self._known[key]

    def _forget(self, key):
        self._freed.append(self._known.pop(key))
        del self._alive[key]

    def _check(self, func, memory, now, *, wrote):
        before = memory.uses() if wrote else [memory.write]
        if any(now.clock[stream] < tick for stream, tick in before):
            self.found.append(f"{func}: {'writes over' if wrote else 'reads'} what another stream is at")
        if wrote:
            memory.write, memory.reads = (now, now.clock[now]), Counter()
        else:
            memory.reads[now] = now.clock[now]

    def _allocated(self, func, now):
        """A new block may be any that was freed in this stream's pool."""
        for memory in [memory for memory in self._freed if memory.pool is now]:
            self._freed.remove(memory)
            if any(now.clock[stream] < tick for stream, tick in memory.uses()):
                self.found.append(f"{func}: is given memory that another stream is at")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
