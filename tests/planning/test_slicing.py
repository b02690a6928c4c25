"""Branches that run slice by slice: of samples, or of tokens where there is one sample; and those that do not."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import RewireError
from tests.helpers.branches import Net
from tests.helpers.nets import WIDTH, assert_same
from tests.helpers.steps import held, results
from tests.helpers.transformer import TOKENS, net, noise


@pytest.mark.slow
@settings(max_examples=10)
@given(chunks=st.integers(2, 7), batch=st.integers(1, 7))
def test_slices_are_the_whole_where_nothing_is_drawn(chunks, batch):
    plain = revwire.rewire(net().eval(), noise())
    sliced = revwire.rewire(net().eval(), noise(), chunks=chunks)
    assert any(step.slices > 1 for step in revwire.plan_of(sliced).steps)
    assert_same(results(plain, noise(batch)), results(sliced, noise(batch)), tolerance=1e-12)


def test_side_inputs_are_cut_with_the_samples_they_belong_to():
    mask = torch.randn(5, TOKENS, TOKENS, dtype=torch.float64)
    plain = revwire.rewire(net().eval(), (noise(), mask))
    sliced = revwire.rewire(net().eval(), (noise(), mask), chunks=2)
    step = revwire.plan_of(sliced).steps[0]
    assert (step.slices, step.sliced_sides) == (2, (True,))
    assert_same(results(plain, noise(), mask), results(sliced, noise(), mask), tolerance=1e-12)
    one_for_all = torch.randn(1, TOKENS, TOKENS, dtype=torch.float64)
    assert_same(results(plain, noise(), one_for_all), results(sliced, noise(), one_for_all), tolerance=1e-12)


class Branch(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(WIDTH, WIDTH), kind
        self.norm = nn.BatchNorm1d(1) if kind == "norm" else nn.Identity()
        self.table = nn.Parameter(torch.randn(5, 1, WIDTH))

    def forward(self, x):
        if self.kind == "mean":
            x = x - x.mean(0)
        if self.kind == "table":
            x = x + self.table
        if self.kind == "roll":
            x = x.roll(1, 0)
        return self.norm(self.fc(x).tanh())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mean", "samples mix"),
        ("table", "built in"),
        ("roll", "samples mix"),
        ("norm", "BatchNorm1d\\) mixes"),
    ],
)
def test_branches_that_mix_samples_are_not_cut(kind, why):
    chain = Net(*(Branch(kind) for _ in range(3)))
    with pytest.raises(RewireError, match=why):
        # one token: where there are several, those could be cut
        revwire.plan(chain, torch.randn(5, 1, WIDTH), chunks=2)


def test_tokens_of_one_sample_are_cut_where_the_branch_treats_them_alike():
    plan = revwire.plan(net(), noise(1), chunks=3)
    kinds = {step.branch: (step.slices, step.slice_dim) for step in plan.steps}
    assert kinds == {("attn",): (3, 0), ("mlp",): (3, 1)}
    model = revwire.rewire(net().eval(), noise(1), chunks=3)
    plain = revwire.rewire(net().eval(), noise(1))
    assert_same(results(plain, noise(2)), results(model, noise(2)), tolerance=1e-12)


def test_slices_lower_the_peak():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=4).train()
    x = torch.randn(16, 3, 64, 64)
    peaks = [held(revwire.rewire(copy.deepcopy(model), x, chunks=n), x)[1] for n in (1, 2, 4, 8)]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    assert peaks[3] < 0.62 * peaks[0]
