"""A net with layers in a row before and after its chain: what runs again as one from the first one's input."""

import torch
from torch import nn

import revwire
from tests.helpers.nets import Residual, recur, x_of

CHANNELS = 6
STEM, TAIL = "conv1+bn1+act1+drop1+maxpool", "bn2+act2+pool"  # as plans name them


def conv(channels=CHANNELS):
    return nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False)  # whose gradient before a norm is noise


def block():
    return Residual(conv(), nn.BatchNorm2d(CHANNELS), nn.Tanh())


class Net(nn.Module):
    """A stem of siblings, as ResNets have: the frame that calls them has no residual of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.act1, self.drop1, self.maxpool = nn.ReLU(inplace=True), nn.Dropout(dropout), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(*(block() for _ in range(3)))
        self.bn2, self.act2, self.pool = nn.BatchNorm2d(CHANNELS), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(CHANNELS, 3)

    def stem(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        self.act1(x)  # as people use it: the old name means the changed tensor
        return self.maxpool(self.drop1(x))

    def tail(self, x):
        return self.head(self.pool(self.act2(self.bn2(x))).flatten(1))

    def forward(self, x, bias=None):
        x = self.stem(x)
        x = self.blocks(x if bias is None else x + bias)
        return self.tail(x)


class ByHand(nn.Module):
    """The recurrence of `Net` in plain autograd."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.tail(recur(self.net.stem(x), [b.body for b in self.net.blocks]))


def net(dropout=0.0):
    torch.manual_seed(0)
    return Net(dropout).double()


def noise(batch=4):
    """Images."""
    return x_of(batch, 3, 8, 8, seed=1)


def rewired(model, x=None):
    return revwire.rewire(model, noise() if x is None else x, transitions="checkpoint")
