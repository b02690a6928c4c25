"""What a rewired module runs: the children and hooks that it has now, as often and in whatever order it is called."""

import random

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from tests.helpers.agreement import WIDTH, InTurn, agrees, assert_replayed_as_kept, block, inputs


def test_a_branch_that_starts_to_change_its_input_in_place_raises():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.body = nn.ReLU(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(self.act(x))

    model = revwire.rewire(nn.Sequential(Block(), Block()), torch.randn(3, WIDTH))
    model[1].act = nn.ReLU(inplace=True)
    with pytest.raises(ReplayError, match="changes its input in place"):
        model(torch.randn(3, WIDTH, requires_grad=True))


def test_a_child_replaced_later_is_the_one_that_runs():
    x = inputs()
    model = revwire.rewire(nn.Sequential(block(), block()).double(), x)
    model[1].body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
    x1 = x + model[0].body(x)
    torch.testing.assert_close(model(x), (x1 + x + model[1].body(x1)) / 2)


def test_layers_dropped_at_random_leave_the_rest_rewired():
    class Net(InTurn):
        def forward(self, x):
            for each in self.blocks:
                if self.training and random.random() < 0.5:
                    continue
                x = each(x)
            return x

    x = inputs()
    model = revwire.rewire(Net(*(block() for _ in range(6))).double(), x).train()
    assert len(revwire.plan_of(model).chains[0].steps) == 6
    for seed in range(5):
        random.seed(seed)
        out = model(x.clone().requires_grad_())
        random.seed(seed)
        previous = current = x
        for each in model.blocks:
            if random.random() >= 0.5:
                previous, current = current, previous + each.body(current)
        torch.testing.assert_close(out, (previous + current) / 2)
        assert type(out) is torch.Tensor


def test_a_block_called_several_times():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return self.block(self.block(self.block(x)))

    agrees(Net, inputs(), steps=3)


def test_a_forward_replaced_on_the_object_is_named():
    model = nn.Sequential(block(), block())
    model[1].forward = model[1].forward
    with pytest.raises(revwire.RewireError, match="1: its forward was replaced on the object"):
        revwire.rewire(model, torch.zeros(3, WIDTH))
    assert not hasattr(type(model[0]), "revwire_original")


def test_a_block_without_grad_in_the_midst_of_a_chain():
    class Net(InTurn):
        def forward(self, x):
            for i, each in enumerate(self.blocks):
                with torch.set_grad_enabled(i != 2):
                    x = each(x)
            return x

    x = inputs()
    assert_replayed_as_kept(revwire.rewire(Net(*(block() for _ in range(5))).double(), x), x, of_input=True)
