"""Sums in other words than a plus are steps, with the gradients of everything kept."""

import copy

import pytest
import torch
from torch import nn

import revwire
from tests.helpers.steps import assert_steps

WIDTH, DEPTH = 8, 4

WORDS = {
    "minus": lambda x, f: x - f,
    "method minus": lambda x, f: x.sub(f),
    "torch.sub": lambda x, f: torch.sub(x, f, alpha=0.5),
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "method alpha": lambda x, f: x.add(f, alpha=-2),
    "sum": lambda x, f: sum([x, f]),
    "sum of three": lambda x, f: sum([x, f, f.tanh()]),
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "stack, branch first": lambda x, f: torch.stack([f, x], dim=1).sum(dim=1),
    "lerp": lambda x, f: torch.lerp(x, f, 0.3),
    "method lerp": lambda x, f: x.lerp(f, 0.3),
    "addcmul": lambda x, f: torch.addcmul(x, f, f.tanh()),
    "addcmul by a value": lambda x, f: torch.addcmul(x, f, f.sigmoid(), value=0.5),
    "addcdiv": lambda x, f: x.addcdiv(f, 1 + f.square()),
}
NOT = {
    "turned round": lambda x, f: f - x,
    "centred": lambda x, f: f - f.mean(-1, keepdim=True),
    "of another": lambda x, f: x.tanh() - f.detach() * 0 - 1,
    "stack, mean": lambda x, f: torch.stack([x, f]).mean(0),
    "stack, over another": lambda x, f: torch.stack([x, f]).sum(1)[0] + f,
}


class Block(nn.Module):
    def __init__(self, word):
        super().__init__()
        self.word, self.norm, self.mix = word, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.word(x, self.mix(self.norm(x)))


def net(word):
    return nn.Sequential(*(Block(word) for _ in range(DEPTH))).double()


@pytest.mark.parametrize("name", WORDS)
def test_it_is_a_step(name):
    torch.manual_seed(0)
    model, x = net(WORDS[name]), torch.randn(5, WIDTH, dtype=torch.float64)
    assert_steps(model, x, DEPTH, [lambda y, block=block: block(y) - y for block in copy.deepcopy(model)])


@pytest.mark.parametrize("name", NOT)
def test_it_is_none(name):
    assert not revwire.plan(net(NOT[name]), torch.randn(5, WIDTH, dtype=torch.float64)).chains
