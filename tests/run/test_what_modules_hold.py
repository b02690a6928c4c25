"""What a branch reads of its modules is noted: what its own frame reads too, and no more often than it has to be."""

import copy

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from revwire.run import state
from revwire.run.contents import Contents, reached
from tests.helpers.nets import WIDTH, assert_same, x_of
from tests.helpers.steps import kept

DEPTH = 3


class Scaled(nn.Module):
    """A block that reads a parameter, a buffer and a plain tensor of its own beside what its children hold."""

    def __init__(self):
        super().__init__()
        self.linear, self.gamma = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("mask", torch.rand(WIDTH))
        self.table = torch.rand(WIDTH, dtype=torch.float64)

    def forward(self, x):
        return x + self.gamma * (self.linear(x).tanh() * self.mask + self.table)


def wired(block=Scaled, **options):
    torch.manual_seed(0)
    return revwire.rewire(nn.Sequential(*(block() for _ in range(DEPTH))).double(), x_of(4, WIDTH), **options)


def other_gamma(block):
    block.gamma = nn.Parameter(3 * block.gamma.detach())


def other_mask(block):
    block.mask = 3 * block.mask


def other_table(block):
    block.table = 3 * block.table


def no_table(block):
    del block.table


def frozen(block):
    block.gamma.requires_grad_(requires_grad=False)


def held(block):
    """All by name."""
    return dict(vars(block)) | dict(block.named_parameters()) | dict(block.named_buffers())


@pytest.mark.parametrize("change", [other_gamma, other_mask, other_table, no_table, frozen])
def test_what_a_frame_reads_itself_is_what_it_was_and_afterwards_what_it_is(change):
    model, found = wired(), []
    for net in (kept(copy.deepcopy(model)), model):
        weights = [*net.parameters()]
        value = net(x_of(4, WIDTH)).square().sum()
        for block in net:
            change(block)
        now = [held(block) for block in net]
        value.backward()
        found.append([w.grad for w in weights])
        for block, was in zip(net, now, strict=True):
            assert held(block).keys() == was.keys()
            assert all(held(block)[key] is was[key] for key in was)
    assert all(g.norm() > 0 for g in found[0] if g is not None)
    assert_same(*found)


@pytest.mark.parametrize("name", ["gamma", "mask", "table"])
def test_what_a_frame_reads_itself_changed_in_place_raises(name):
    model = wired(check=False)
    value = model(x_of(4, WIDTH)).square().sum()
    with torch.no_grad():
        getattr(model[1], name).mul_(2)
    with pytest.raises(ReplayError, match=rf"1#0: Scaled\.{name} was changed in place"):
        value.backward()


class Calling(nn.Module):
    """Its body is a module, with a dict and a list of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.body.table, self.body.names = {"a": 1}, ["a"]

    def forward(self, x):
        return x + self.body(x)


def test_what_stays_as_it_is_is_looked_at_once(monkeypatch):
    """Looking takes longer than the rest of a small branch."""
    made = []
    monkeypatch.setattr(state, "Contents", lambda *given: made.append(given) or Contents(*given))
    model = wired(Calling)
    for _ in range(3):
        model(x_of(4, WIDTH)).sum().backward()
    assert len(made) == DEPTH
    model[1].body.table["a"] = 2
    model(x_of(4, WIDTH)).sum().backward()
    assert len(made) == DEPTH + 1


def test_a_module_that_two_hold_is_reached_once():
    shared = nn.Linear(WIDTH, WIDTH)
    one, other = nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared)
    assert sorted(map(id, reached([one, other, one]))) == sorted(map(id, (one, other, shared, one[1])))
