"""A net with code of a test's own in the middle of its chain, and recurrences that leave the chain there or go on."""

import copy

import torch
from torch import nn

import revwire
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, recur, x_of


class Blocks(nn.Module):
    """Four blocks; `middle` runs on the trunk between the second and the third, once the model is rewired."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            Residual(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)
        )
        self.middle = None

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1 and self.middle is not None:
                x = self.middle(x)
        return x


class Leaving:
    """The recurrence of `Blocks` that leaves the chain in the middle and enters another one."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        first, second = self.net.blocks[:2], self.net.blocks[2:]
        x = self.net.middle(recur(x, [b.body for b in first]))
        return recur(x, [b.body for b in second])


class Staying(Leaving):
    """The recurrence that goes on after the middle, which looks at the trunk and hands it back."""

    def __call__(self, x):
        previous = current = x
        for i, block in enumerate(self.net.blocks):
            previous, current = current, previous + block.body(current)
            if i == 1:
                self.net.middle((previous + current) / 2)
        return (previous + current) / 2


def noise():
    return x_of(4, WIDTH)


def pair(middle=None, make=Blocks):
    """A net as it was and rewired, both with this middle."""
    torch.manual_seed(0)
    net = make().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, noise())
    reference.middle = model.middle = middle
    return reference, model


def agree(recurrence, middle, extra=lambda: ()):
    """Outputs, gradients, and the losses that `middle` left in `extra()`."""
    reference, model = pair(middle)
    found = []
    for run, net in ((recurrence(reference), reference), (model, model)):
        x = noise().requires_grad_()
        out = run(x)
        sum(map(loss, (out, *extra()))).backward()
        found.append([out, x.grad, *gradients(net)])
    assert_same(*found)
