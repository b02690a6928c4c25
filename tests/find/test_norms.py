"""A norm after a sum moves into the branch: a module, a function, or written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import revwire
from tests.helpers.steps import assert_steps

WIDTH, DEPTH = 8, 4


def rms(y):
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(y):
    mean = y.mean(-1, keepdim=True)
    return (y - mean) / torch.sqrt(((y - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


NORMS = {
    "layer_norm": lambda b, y: functional.layer_norm(y, (WIDTH,), b.weight, b.bias),
    "rms_norm": lambda b, y: functional.rms_norm(y, (WIDTH,), b.weight),
    "group_norm": lambda b, y: functional.group_norm(y, 2, b.weight, b.bias),
    "normalize": lambda b, y: functional.normalize(y, dim=-1),
    "dropout before": lambda b, y: functional.layer_norm(functional.dropout(y, 0.2, b.training), (WIDTH,)),
    "RMSNorm written out": lambda b, y: rms(y) * b.weight,
    "weight first": lambda b, y: b.weight * rms(y),
    "LayerNorm written out": lambda b, y: layer(y) * b.weight + b.bias,
    "without weights": lambda b, y: layer(y),
    "divided by its length": lambda b, y: y / y.norm(dim=-1, keepdim=True),
    "standardised": lambda b, y: (y - y.mean()) / y.std(),
}
OTHERS = {
    "softmax": lambda b, y: y.softmax(-1),
    "centred": lambda b, y: y - y.mean(-1, keepdim=True),
    "a weight": lambda b, y: y * b.weight,
    "attended": lambda b, y: y * y.mean(-1, keepdim=True).sigmoid(),
    "scaled by another": lambda b, y: y / (1 + b.mix.weight.norm()),
}


class Block(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.after, self.mix = after, nn.Linear(WIDTH, WIDTH)
        self.weight, self.bias = nn.Parameter(1 + torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return self.after(self, x + self.mix(x).tanh())


def net(after):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(after) for _ in range(DEPTH))).double()


@pytest.mark.parametrize("name", NORMS)
def test_it_moves_into_the_branch(name):
    model, x = net(NORMS[name]), torch.randn(5, WIDTH, dtype=torch.float64)
    branches = [lambda y, block=block: block.after(block, block.mix(y).tanh()) for block in model]
    assert_steps(model.eval(), x, DEPTH, branches)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_ends_the_trunk(name):
    assert not revwire.plan(net(OTHERS[name]), torch.randn(5, WIDTH, dtype=torch.float64)).chains


@pytest.mark.parametrize(
    "after", [lambda b, y: y.movedim(0, -1).contiguous(), lambda b, y: y.transpose(0, 1)]
)
def test_a_trunk_of_one_number_is_planned_without_a_warning(after):
    class One(nn.Module):
        def forward(self, x):
            return after(self, x + x.tanh())

    plan = revwire.plan(nn.Sequential(*(One() for _ in range(DEPTH))), torch.randn(1, 1))
    assert [len(chain.steps) for chain in plan.chains] == [DEPTH]
