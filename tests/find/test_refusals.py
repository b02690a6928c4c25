"""Residual additions that are no step: a graph would not reproduce their frame, and the plan says why."""

import random

import pytest
import torch
from torch import nn

import revwire
from tests.helpers.agreement import WIDTH, Bodied
from tests.helpers.nets import Residual


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def setattr_and_return(module, value):
    module.last = value
    return value


def without_grad(body, x):
    with torch.no_grad():
        return body(x)


def through_a_view(module, x):
    hidden = torch.cat([module.body(x), x], dim=1)
    part = hidden[:, :WIDTH]
    part += x
    return hidden[:, 1 : WIDTH + 1]


REFUSED = {
    "changes a tensor in place that its branch is given": lambda self, x: (
        x + torch.ones(3, WIDTH).mul_(self.body(x))
    ),
    "adds to a part of a larger tensor in place": through_a_view,
    "stores a value on the module": lambda self, x: x + setattr_and_return(self, self.body(x)),
    "under a context of its own": lambda self, x: x + without_grad(self.body, x),
    "draws Python random numbers": lambda self, x: x + self.body(x) * random.random(),
    "decides by the numbers in a tensor": lambda self, x: x + self.body(x) if x.sum() > 0 else x,
    "autograd.Function": lambda self, x: x + Doubled.apply(self.body(x)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_graph_would_not_reproduce_is_refused_with_its_reason(reason):
    block = type("Block", (Bodied,), {"forward": REFUSED[reason]})
    model = nn.Sequential(block(), block())
    plan = revwire.plan(model, torch.randn(3, WIDTH))
    assert not plan.chains
    assert any(reason in skipped.reason for skipped in plan.skipped), plan.skipped
    with pytest.raises(revwire.RewireError, match="no two residual blocks"):
        revwire.rewire(model, torch.randn(3, WIDTH))


def test_a_child_that_changes_its_input_in_place_is_refused():
    blocks = (Residual(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
    plan = revwire.plan(nn.Sequential(*blocks), torch.randn(3, WIDTH))
    assert not plan.chains
    assert "adds what its branch has changed in place" in plan.skipped[0].reason
