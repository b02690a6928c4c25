"""Children of an `nn.Sequential` as steps: couplings that keep `x[i]` take any block G, `F(x) = G(x) - x`."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from tests.helpers.nets import Residual, assert_same, x_of
from tests.helpers.steps import kept, results

CHANNELS = 6


def conv():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def residual():
    return Residual(conv(), nn.Tanh())


class Unchained(nn.Module):
    """A block with a residual of its own that is not the whole of it."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = conv(), residual()

    def forward(self, x):
        return -self.inner(self.first(x))


CHILDREN = {
    "conv": conv,
    "norm": lambda: nn.BatchNorm2d(CHANNELS),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "drop": lambda: nn.Dropout(0.2),
    "identity": nn.Identity,
    "residual": residual,
    "block": Unchained,
    "nested": lambda: nn.Sequential(conv(), nn.Tanh(), conv()),
    "narrow": lambda: nn.Sequential(nn.Conv2d(CHANNELS, 2, 1), nn.ReLU(), nn.Conv2d(2, CHANNELS, 1)),
}

BETWEEN = {"norm", "relu", "gelu", "drop", "identity"}


def noise(seed=0, dtype=torch.float32):
    return x_of(2, CHANNELS, 5, 5, seed=seed, dtype=dtype)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(CHILDREN)), min_size=2, max_size=9), st.integers(0, 2**31))
def test_any_sequence_keeps_its_function_and_its_gradients(names, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(*(CHILDREN[name]() for name in names))
    x = noise(seed)
    if not revwire.plan(net, x, coupling="bdia").chains:
        # two blocks in a row are what it takes
        assert sum(name not in BETWEEN for name in names) < 2
        return
    model = revwire.rewire(copy.deepcopy(net), x, coupling="bdia", exact=True)
    # the norms' statistics move in both alike
    net.train()(x)
    model.train()
    model.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x), model.eval()(x))
    model.train()
    assert_same(results(kept(model), x), results(model, x), tolerance=0)


def test_the_recurrence_over_whole_blocks_is_the_one_written_out():
    torch.manual_seed(0)
    blocks = [nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)) for _ in range(3)]
    flat = nn.Sequential(*(child for block in blocks for child in block)).double()
    x = noise(dtype=torch.float64)
    model = revwire.rewire(flat, x, coupling=revwire.Dr2Net(0.75, 0.5))
    assert [step.branch for step in revwire.plan_of(model).steps] == [
        ("0", "1", "2"),
        ("3", "4", "5"),
        ("6", "7", "8"),
    ]
    previous, current = torch.zeros_like(x), x
    for block in blocks:
        previous, current = current, 0.5 * previous + 0.75 * current + block(current) - current
    assert_same([current], [model(x)], tolerance=1e-12)


def test_residual_additions_come_before_whole_blocks():
    x = noise()
    net = nn.Sequential(conv(), residual(), conv(), nn.ReLU(), residual())
    chain = revwire.plan(net, x, coupling="momentum").chains[0]
    assert [(step.name, step.block) for step in chain.steps] == [
        ("(model)#0", True),
        ("1#0", False),
        ("(model)#2", True),
        ("4#0", False),
    ]
    vit = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert revwire.plan(vit, coupling="bdia").chains == revwire.plan(vit).chains


def test_couplings_without_x_i_take_no_whole_blocks():
    net = nn.Sequential(conv(), conv(), conv())
    assert not revwire.plan(net, noise()).chains
    assert len(list(revwire.plan(net, noise(), coupling="dr2net").steps)) == 3
    assert not revwire.plan(net, noise(), coupling="dr2net", exclude="").chains


def test_a_plan_of_blocks_survives_json_and_a_replaced_child_runs():
    net, x = nn.Sequential(conv(), nn.Tanh(), conv(), nn.Tanh()), noise()
    plan = revwire.plan(net, x, coupling="bdia")
    assert revwire.Plan.from_json(plan.to_json()) == plan
    model = revwire.rewire(net, x, coupling="bdia", plan=plan).eval()
    before = model(x)
    model[2] = nn.Identity()
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), model[0](x).tanh().tanh())


class Twice(nn.Sequential):
    """A Sequential only by its base class."""

    def forward(self, x):
        return super().forward(super().forward(x)) * 2


def test_a_sequential_with_a_forward_of_its_own_is_no_sequence():
    assert not revwire.plan(Twice(conv(), conv()), noise(), coupling="bdia").chains


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "convmixer_768_32"])
def test_nets_without_residual_chains_of_their_own_are_verified(name):
    model = timm.create_model(name, num_classes=4)
    if name == "convmixer_768_32":
        del model.blocks[4:]
    else:
        model = model.features
    report = revwire.verify(model, torch.randn(2, 3, 32, 32), coupling="bdia", exact=True)
    assert report.ok, report
