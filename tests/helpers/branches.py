"""A net of residual branches that are modules of any kind, and its recurrence: the fixture of the replay's tests."""

import copy

import torch
from torch import nn

import revwire
from tests.helpers.nets import WIDTH, loss, recur, x_of
from tests.helpers.steps import assert_alike


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


def noise(seed=0):
    """What goes through most of these nets."""
    return x_of(4, WIDTH, seed=seed)


def pair(branch, x=None, depth=3):
    torch.manual_seed(0)
    net = Net(*(branch() for _ in range(depth))).double()
    reference = Reference(*copy.deepcopy(net).branches)
    return reference, revwire.rewire(net, noise() if x is None else x)


def agree(branch, run=lambda net, x: loss(net(x)).backward(), x=None):
    """`run` leaves the same results, gradients, buffers, modes and random states with both."""
    x = noise() if x is None else x
    reference, model = pair(branch, x)
    assert_alike(reference, model, run, x, seed=1)
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
