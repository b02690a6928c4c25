"""Right steps whose numbers are a little off: the check lets them pass, and still finds those that are wrong."""

import pytest
import timm
import torch
from torch import nn

import revwire

WIDTH, DEPTH = 16, 12


class Coarse(nn.Module):
    """A branch that autocast runs in bfloat16."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + 4 * self.mix(self.norm(x))


class Fine(nn.Module):
    """A branch that stays in float32 under autocast."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + 0.1 * (self.norm(x).softmax(-1) - 1 / WIDTH)


def net():
    return nn.Sequential(*(Fine() if i % 3 == 1 else Coarse() for i in range(DEPTH)))


@pytest.mark.parametrize("coupling", ["re2tal", "bdia", revwire.Momentum(0.5), revwire.Momentum(0.9)])
def test_branches_of_two_precisions_in_one_chain(coupling):
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(32, WIDTH)
        model = revwire.rewire(net(), x, coupling=coupling).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()


@pytest.mark.parametrize("at", [1, 10])
def test_a_wrong_one_is_found_out_all_the_same(at):
    torch.manual_seed(0)
    x = torch.randn(32, WIDTH)
    model = revwire.rewire(net(), x).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    model[at].norm.weight.data = 3 * torch.rand(WIDTH)
    with pytest.raises(revwire.ReplayError):
        loss.backward()


def test_pooling_in_float32_among_products_in_bfloat16():
    """BDIA doubles, with each step back, what the other branches' rounding has put into the trunk."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model("poolformerv2_s12", drop_path_rate=0.1).train()
        x = torch.randn(2, 3, 64, 64)
        revwire.rewire(model, x, coupling="bdia")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
