"""Branches run by torch.compile: the same gradients, and one compilation for blocks that are alike."""

import copy
import itertools
import shutil

import pytest
import torch
from torch import nn

import revwire
from revwire.rewrite.wired import options_of
from tests.helpers import compiling
from tests.helpers.nets import assert_same, gradients

# torch's own, from inside of dynamo
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

WIDTH = 8


class DropPath(nn.Module):
    """As timm's: each block has a rate of its own."""

    def __init__(self, rate):
        super().__init__()
        self.drop_prob = rate

    def forward(self, x):
        kept = torch.rand(len(x), 1) >= self.drop_prob if self.training else torch.ones(())
        return x * kept.to(x.dtype)


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)
        self.drop, self.outer, self.drop_path = nn.Dropout(0.2), nn.Linear(16, WIDTH), DropPath(rate)

    def forward(self, x):
        return x + self.drop_path(self.outer(self.drop(self.inner(self.norm(x)).tanh())))


def net(depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(0.1 + 0.05 * i) for i in range(depth)))


@pytest.fixture
def counter(monkeypatch):
    """Compiles as torch does but for the kernels, which stay torch's own, and counts."""
    monkeypatch.setattr(torch, "compile", compiling.counted)
    yield compiling.fresh()
    compiling.fresh()


DIALS = [{"chunks": 2, "transitions": "checkpoint"}, {"anchor": "*"}, {"keep": 2}]


@pytest.mark.parametrize("dials", [{}, *(pytest.param(dials, marks=pytest.mark.slow) for dials in DIALS)])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_without(counter, dials, training):
    x = torch.randn(5, WIDTH)
    found = []
    for compiles in (False, True):
        model = revwire.rewire(net(), x, compile=compiles, **dials).train(training)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append([*gradients(model), torch.rand(2)])
    assert counter.frame_count > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_one_compilation_for_blocks_that_are_alike(counter):
    x = torch.randn(5, WIDTH)
    counts = []
    for depth in (4, 12):
        model = revwire.rewire(net(depth), x, compile=True)
        for _ in range(2):
            model(x).sum().backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]


def test_blocks_of_another_kind_are_compiled_apart(counter):
    """A function that serves too many kinds is not compiled any more: each has one of its own."""
    x, counts = torch.randn(5, WIDTH), [0]
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (16, 20, 24, 28):
            model = net(3)
            for block in model:
                block.inner, block.outer = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
            revwire.rewire(model, x, compile=True)(x).sum().backward()
            counts.append(counter.frame_count)
    added = [after - before for before, after in itertools.pairwise(counts)]
    assert len(set(added)) == 1
    assert added[0] > 0


def test_copies_and_loads_are_compiled_too(counter, tmp_path):
    x = torch.randn(5, WIDTH)
    model = revwire.rewire(net(), x, compile=True).eval()
    wanted = model(x)
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert options_of(other).compile
        assert_same([other(x)], [wanted])
    assert not options_of(revwire.rewire(net(), x)).compile


def test_an_estimate_runs_branches_as_they_are(counter):
    x = torch.randn(5, WIDTH)
    rows = revwire.estimate(net(), x, strategies={"": {}, "compiled": {"compile": True}}).rows
    assert rows[0].peak == rows[1].peak
    assert counter.frame_count == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_real_compiler():
    class Other(Block):
        """Which no other test has compiled already."""

    torch.manual_seed(0)
    net, x = nn.Sequential(*(Other(0.1) for _ in range(3))), torch.randn(5, WIDTH)
    plain, compiled = (revwire.rewire(copy.deepcopy(net), x, compile=c).eval() for c in (False, True))
    for model in (plain, compiled):
        model(x).square().sum().backward()
    for one, other in zip(gradients(plain), gradients(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
