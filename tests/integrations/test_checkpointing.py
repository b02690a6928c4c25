"""torch.utils.checkpoint around a part that holds a chain, around some of its blocks, and timm's own switch.

Around whole models and single blocks: `test_branches.py`, `test_between_blocks.py`.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import revwire
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, recur
from tests.helpers.pictures import Pictures, rewired
from tests.helpers.steps import kept

DEPTH = 6


def block():
    return Residual(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Tanh())


class Net(nn.Module):
    """A stem, blocks, and a head; `run` is how the blocks are gone through."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.Sequential(*(block() for _ in range(DEPTH)))
        self.run = lambda blocks, x: blocks(x)

    def forward(self, x):
        return self.head(self.run(self.blocks, self.stem(x)))


def some(blocks, x, first, last):
    for block in blocks[first:last]:
        x = block(x)
    return x


def half(blocks, x, first, last, **options):
    """Some blocks in the middle of the chain are checkpointed together: streams go in and come out."""
    x = some(blocks, x, 0, first)
    x = checkpoint(functools.partial(some, blocks, first=first, last=last), x, use_reentrant=False, **options)
    return some(blocks, x, last, DEPTH)


def sparing(*_, **__):
    return CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {
    "all": lambda blocks, x: checkpoint(blocks, x, use_reentrant=False),
    "all, reentrant": lambda blocks, x: checkpoint(blocks, x, use_reentrant=True),
    "the first half": functools.partial(half, first=0, last=3),
    "the middle": functools.partial(half, first=2, last=4),
    "the last half": functools.partial(half, first=3, last=DEPTH),
    "without an early stop": functools.partial(half, first=1, last=5, early_stop=False),
    "in two halves": lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=False),
    "by choice of operation": functools.partial(
        half,
        first=1,
        last=5,
        context_fn=functools.partial(create_selective_checkpoint_contexts, sparing),
    ),
    "within one another": lambda blocks, x: checkpoint(
        functools.partial(half, blocks, first=2, last=4), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_recurrence(way):
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    net = Net().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x)
    reference.run = lambda blocks, x: recur(x, [b.body for b in blocks])
    model.run = WAYS[way]
    found = []
    for m in (reference, model):
        torch.manual_seed(1)
        out = m(x)
        between = torch.rand(1)
        loss(out).backward()
        found.append([out, between, *gradients(m), torch.rand(1)])
    assert_same(*found)


@pytest.mark.parametrize("train", [True, False])
def test_timm_s_switch(train):
    """`set_grad_checkpointing` on a rewired ViT: `checkpoint_seq` over blocks of a chain. Of no use, and right."""
    x = Pictures(3).pictures
    found = []
    for on in (False, True):
        model = rewired().train(train)
        model = model if on else kept(model)
        model.set_grad_checkpointing(on)
        torch.manual_seed(1)
        out = model(x)
        loss(out).backward()
        found.append([out, *gradients(model)])
    assert_same(*found)
