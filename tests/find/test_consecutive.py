"""Which steps follow each other on one trunk: what stands between two of them ends the chain, or does not."""

import copy

import torch
from torch import nn

import revwire
from tests.helpers.agreement import WIDTH, block
from tests.helpers.nets import Loop, assert_same, gradients, loss, x_of


def test_dropout_between_blocks_leaves_the_chain_in_the_plan_as_when_it_runs():
    model = nn.Sequential(block(), block(), nn.Dropout(0.5), block(), block(), nn.Identity(), block())
    plan = revwire.plan(model, torch.zeros(3, WIDTH))
    assert [[step.module for step in chain.steps] for chain in plan.chains] == [["0", "1"], ["3", "4", "6"]]


def test_a_trunk_changed_in_place_between_two_steps_of_one_frame_leaves_the_chain():
    class Halving(Loop):
        def forward(self, x):
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
                x = x.mul_(0.5)
            return x

    torch.manual_seed(0)
    net, x = Halving(depth=3).double(), x_of(4, 5, WIDTH)
    reference, model = copy.deepcopy(net), revwire.rewire(net, x)
    trunk = x
    for first, second in reference.layers:
        middle = trunk + first(trunk)
        trunk = (middle + trunk + second(middle)) / 2 * 0.5
    out = model(x)
    loss(trunk).backward()
    loss(out).backward()
    assert_same([trunk, *gradients(reference)], [out, *gradients(model)])
