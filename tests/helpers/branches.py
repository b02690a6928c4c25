"""A net of residual branches that are modules of any kind, and its recurrence: the fixture of the replay's tests."""

import copy
import random

import torch
from torch import nn

import revwire
from tests.helpers.nets import WIDTH, assert_same, gradients, loss, recur


class Net(nn.Module):
    """Residual branches in a row; `F` of each is a module, opaque to the plan."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


class Reference(Net):
    """The same branches through the recurrence."""

    def forward(self, x):
        return recur(x, self.branches)


def x_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, WIDTH), dtype=torch.float64, generator=generator)


def pair(branch, x=None, depth=3):
    torch.manual_seed(0)
    net = Net(*(branch() for _ in range(depth))).double()
    reference = Reference(*copy.deepcopy(net).branches)
    return reference, revwire.rewire(net, x_of() if x is None else x)


def agree(branch, run=lambda net, x: loss(net(x)).backward(), x=None):
    """`run` leaves the same gradients, buffers, attributes and random states with both."""
    reference, model = pair(branch, x)
    found = []
    for net in (reference, model):
        torch.manual_seed(1)
        random.seed(1)
        results = run(net, x_of() if x is None else x)
        numbers = torch.tensor([random.random()]), torch.rand(1)
        found.append([*(results or ()), *gradients(net), *net.buffers(), *numbers])
    assert any(g is not None and g.norm() > 0 for g in gradients(reference))
    assert_same(*found)
    for ours, theirs in zip(model.branches.modules(), reference.branches.modules(), strict=True):
        assert ours.training == theirs.training
    return reference, model


def linear():
    return nn.Linear(WIDTH, WIDTH)


def mlp():
    return nn.Sequential(linear(), nn.Tanh(), linear())


class Wrapped(nn.Module):
    """A layer whose output is changed by what subclasses keep on the module."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
