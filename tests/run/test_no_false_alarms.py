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


class Normed(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.mix(self.norm(x))


def gradients(model, x):
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def farthest(found, wanted):
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_what_rounding_makes_wrong_is_no_false_alarm(training):
    """Tokens of zeros before a norm with a tiny eps, as an untrained DeiT's: of a rounding it makes 0.01."""
    x = torch.randn(4, 6, WIDTH)
    x[:, :2] = 0

    def rewired(eps, **how):
        torch.manual_seed(0)
        model = nn.Sequential(*(Normed(eps) for _ in range(4))).train(training)
        return revwire.rewire(model, x, **how)

    wanted = gradients(rewired(1e-12, keep="*"), x)
    assert farthest(gradients(rewired(1e-12, check=False), x), wanted) > 1e-3
    with pytest.raises(revwire.ReplayError, match=r"0#0: .*tokens of zeros .* keep= the step, or exact=True"):
        gradients(rewired(1e-12), x)
    assert farthest(gradients(rewired(1e-12, keep="0#0"), x), wanted) < 1e-5
    # the usual eps is no matter
    assert farthest(gradients(rewired(1e-5), x), gradients(rewired(1e-5, keep="*"), x)) < 1e-3
