"""Residual blocks in the ways in which people write them, with inner state of every kind."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.utils import parametrizations

WIDTH, TOKENS = 6, 4


class Feature(nn.Module):
    """What a branch does beside its linear layer; `strength` is a setting of the caller's.

    `repeats`: whether it does the same once more, as torch's checkpoint has to take for granted. `lends`: whether, in
    eval mode, its graph holds statistics that a later forward in training moves without a word: torch's own gradients
    are wrong then (those of a rewired chain are not), and there is nothing to compare with.
    """

    strength = 1.0
    repeats = True
    lends = False

    def forward(self, y):
        return y * self.strength


class Dropout(Feature):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, y):
        return self.drop(y)


class FunctionalDropout(Feature):
    def forward(self, y):
        return F.dropout(y, 0.2, self.training)


class DropPath(Feature):
    def forward(self, y):
        if not self.training:
            return y
        return y * y.new_empty(len(y), 1, 1).bernoulli_(0.7) / 0.7


class BatchNorm(Feature):
    repeats = False
    lends = True

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, y):
        return self.norm(y.transpose(1, 2)).transpose(1, 2)


class OwnStatistics(Feature):
    """A norm on F.batch_norm, which moves its buffers without a word."""

    repeats = False
    lends = True

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, y):
        flat = y.reshape(-1, WIDTH)
        return F.batch_norm(flat, self.mean, self.var, training=self.training).view_as(y)


class Counter(Feature):
    repeats = False
    count = 0

    def forward(self, y):
        self.count += 1
        return y * (1 + 0.1 * (self.count % 5))


class CountingBuffer(Feature):
    repeats = False

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, y):
        self.count += 0.1
        return y * torch.cos(self.count)


class Average(Feature):
    """An average that moves in training, through `.data`."""

    repeats = False

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, y):
        if self.training:
            self.average.data.lerp_(y.detach().mean((0, 1)), 0.3)
        return y - self.average.clone()


class Table(Feature):
    repeats = False

    def __init__(self):
        super().__init__()
        self.table = {"calls": {"n": 0}}

    def forward(self, y):
        self.table["calls"]["n"] += 1
        self.table.setdefault(f"seen {self.table['calls']['n'] % 3}", []).append(len(y))
        return y * (1 + 0.1 * (len(self.table) + self.table["calls"]["n"] % 4))


class Tuple(Feature):
    repeats = False
    state = (0, "a")

    def forward(self, y):
        self.state = (self.state[0] + 1, self.state[1])
        return y * (1 + 0.1 * (self.state[0] % 7))


class Object(Feature):
    repeats = False

    def __init__(self):
        super().__init__()
        self.state = SimpleNamespace(seen=set(), strength=1.0)

    def forward(self, y):
        self.state.seen.add(len(self.state.seen) % 6)
        return y * (1 + 0.1 * len(self.state.seen)) * self.state.strength


class Masked(Feature):
    def __init__(self):
        super().__init__()
        self.mask = torch.linspace(0.5, 1, WIDTH)

    def forward(self, y):
        return y * self.mask


class Remembers(Feature):
    """Keeps what it returned last, history and all."""

    last = None

    def forward(self, y):
        self.last = y * self.strength
        return self.last


class OwnGenerator(Feature):
    repeats = False

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, y):
        return y + 0.1 * torch.randn(WIDTH, generator=self.generator)


class PythonRandom(Feature):
    repeats = False

    def forward(self, y):
        return y * random.uniform(0.5, 1)


class NumpyRandom(Feature):
    repeats = False

    def forward(self, y):
        return y * float(np.random.rand())  # noqa: NPY002


class Attention(Feature):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, y):
        q, k, v = self.qkv(y).chunk(3, -1)
        return ((q @ k.transpose(1, 2)) * self.strength).softmax(-1) @ v


class Expert(Feature):
    """Routing by argmax, and a relu's kink."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, y):
        return F.relu(y) * F.one_hot(self.gate(y).argmax(-1), 3).to(y.dtype).matmul(self.experts)


class Normed(Feature):
    def __init__(self):
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, y):
        return self.inner(y) * self.strength


FEATURES = [
    Feature, Dropout, FunctionalDropout, DropPath, BatchNorm, OwnStatistics, Counter, CountingBuffer, Average, Table,
    Tuple, Object, Masked, Remembers, OwnGenerator, PythonRandom, NumpyRandom, Attention, Expert, Normed,
]  # fmt: skip


class Body(nn.Module):
    def __init__(self, feature):
        super().__init__()
        self.norm, self.linear, self.feature = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), feature()

    def forward(self, x):
        return self.feature(torch.tanh(self.linear(self.norm(x))))


class Block(nn.Module):
    """`on` is a setting that takes the sum out of the code."""

    on = True
    repeats = True

    def __init__(self, first, second):
        super().__init__()
        self.body, self.second = Body(first), Body(second)
        self.gamma, self.norm = nn.Parameter(torch.full((WIDTH,), 0.5)), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.body(x)


class Reversed(Block):
    def forward(self, x):
        return self.body(x) + x


class OutOfPlaceMethod(Block):
    def forward(self, x):
        return x.add(self.body(x))


class TorchAdd(Block):
    def forward(self, x):
        return torch.add(self.body(x), x)


class Alpha(Block):
    def forward(self, x):
        return torch.add(x, self.body(x), alpha=0.5)


class InPlace(Block):
    def forward(self, x):
        y = self.body(x) * 1.0
        y += x
        return y


class Shortcut(Block):
    def forward(self, x):
        shortcut = x
        x = self.body(x)
        x = self.gamma * x
        return shortcut + x


class TwoSums(Block):
    def forward(self, x):
        x = x + self.body(x)
        return x + self.gamma * self.second(x)


class Parallel(Block):
    def forward(self, x):
        return x + self.body(x) + self.second(x)


class PostNorm(Block):
    def forward(self, x):
        return self.norm(x + self.body(x))


class SumOfList(Block):
    def forward(self, x):
        return sum([x, self.body(x)])


class DroppedSum(Block):
    def forward(self, x):
        return x + F.dropout(self.body(x), 0.2, training=self.training)


class Conditional(Block):
    def forward(self, x):
        return x + self.body(x) if self.on else x


class InAMethod(Block):
    def forward(self, x):
        return self.residual(x, self.body)

    def residual(self, x, branch):
        return x + branch(x)


class LayerDrop(Block):
    repeats = False

    def forward(self, x):
        if self.training and random.random() < 0.3:
            return x
        return x + self.body(x)


class OnlyInTraining(Block):
    def forward(self, x):
        y = self.body(x)
        if self.training and not torch.isfinite(y).all():
            y = y.nan_to_num()
        return x + y


BLOCKS = [
    Block, Reversed, OutOfPlaceMethod, TorchAdd, Alpha, InPlace, Shortcut, TwoSums, Parallel, PostNorm, SumOfList,
    DroppedSum, Conditional, InAMethod, LayerDrop, OnlyInTraining,
]  # fmt: skip


class Net(nn.Module):
    """A stem, blocks in a loop or in two stages, a head; `taps` hands out what flows between the blocks."""

    def __init__(self, blocks, *, staged, taps):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.staged, self.taps = staged, taps
        half = len(blocks) // 2
        stages = [blocks[:half], blocks[half:]] if staged else [blocks]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.between = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.stem(x)
        tapped = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.between(x)
            if self.taps:
                for block in stage:
                    x = block(x)
                    tapped.append(x)
            else:
                x = stage(x)
        out = self.head(x)
        return out + sum(t.mean() for t in tapped) if tapped else out
