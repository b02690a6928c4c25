"""What `verify` says of a model whose gradients are wrong."""

import itertools

import pytest
import torch
from torch import nn

import revwire
from tests.helpers.branches import Net, linear, noise

RUNS = itertools.count()


class Off(torch.autograd.Function):
    """`x * weight`; from what a second run has saved, the gradient of the weight comes out a little off."""

    @staticmethod
    def forward(ctx, x, weight, off):
        ctx.run, ctx.weight, ctx.off = next(RUNS), weight, off
        ctx.save_for_backward(x, torch.tensor(ctx.run))
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, run = ctx.saved_tensors
        error = 1.01 if ctx.off and int(run) != ctx.run else 1.0
        return grad * ctx.weight, (grad * x).sum(0) * error, None


class Scale(nn.Module):
    """Off in float32, at the first weights that it is run with or at any."""

    first = None

    def __init__(self, *, everywhere):
        super().__init__()
        self.weight, self.everywhere = nn.Parameter(torch.ones(8)), everywhere

    def forward(self, x):
        if type(x) is torch.Tensor and Scale.first is None:
            Scale.first = self.weight.detach().float()
        off = self.everywhere or (Scale.first is not None and torch.equal(self.weight.float(), Scale.first))
        return Off.apply(x, self.weight, off and x.dtype == torch.float32)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_float32_gradient_is_wrong_only_if_it_is_wrong_beside_too(monkeypatch, everywhere):
    """At its kink an activation may come out on either side; at weights a little beside it does not."""
    monkeypatch.setattr(Scale, "first", None)
    torch.manual_seed(0)
    branches = [nn.Sequential(linear(), Scale(everywhere=everywhere), nn.Tanh()), linear(), linear()]
    report = revwire.verify(Net(*branches), noise().float())
    checks = {check.name: check for check in report.checks}
    for mode in ("train", "eval"):
        assert checks[f"gradients, {mode}, float32"].ok is not everywhere
        assert checks[f"gradients, {mode}, float64"].ok
