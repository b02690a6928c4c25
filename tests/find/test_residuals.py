"""Residual additions however they are written: in a child, by pieces, scaled, before a norm, in turns."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from revwire.run.coupling import Original
from tests.helpers.agreement import WIDTH, agrees, inputs, post_norm, rewired
from tests.helpers.branches import Net, linear


def test_a_sum_of_a_child_s_two_arguments_and_the_norm_after_it():
    agrees(post_norm, inputs(), steps=3)
    x, net = inputs(), post_norm().double().eval()

    def branch(layer, v):
        return layer.output.norm(layer.output.dense(layer.self(v).tanh()))

    previous = current = x
    for layer in net:
        previous, current = current, previous + branch(layer, current)
    torch.testing.assert_close(revwire.rewire(net, x)(x), (previous + current) / 2)


@pytest.mark.parametrize("trunk_first", [True, False])
def test_the_rewritten_sum_has_the_memory_layout_of_the_frame_s_own(trunk_first):
    """The layout decides which kernel comes next, and so the last bits."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, x):
            out = self.conv(x).contiguous(memory_format=torch.channels_last)
            return x + out if trunk_first else out + x

    x, net = torch.randn(2, WIDTH, 5, 5), nn.Sequential(Block(), Block())
    wanted = net(x)
    found = rewired(net, x, Original())(x)
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Pieces(nn.Module):
    """A residual of the patch tokens only; `how` it puts the trunk together."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x):
        if self.how == "cat":
            return torch.cat([x[:, :1], x[:, 1:] + self.body(x[:, 1:]).tanh()], dim=1)
        if self.how == "split":
            first, rest = x.split([1, x.shape[1] - 1], dim=1)
            return torch.cat((first + self.body(rest).mean(1, keepdim=True), rest), 1)
        if self.how == "select":
            return (
                torch.cat([x[:, 0].unsqueeze(1), x[:, 1:] + self.body(x)[:, 1:]], dim=1) + self.body(x).sin()
            )
        return torch.cat([x[:, 1:] + self.body(x[:, 1:]), x[:, :1]], dim=1)


@pytest.mark.parametrize("how", ["cat", "split", "select"])
def test_a_trunk_put_together_from_its_slices(how):
    agrees(lambda: nn.Sequential(*(Pieces(how) for _ in range(3))), inputs(2, 4, WIDTH), steps=3)


def test_a_trunk_put_together_in_another_order_is_none():
    plan = revwire.plan(nn.Sequential(Pieces("swapped"), Pieces("swapped")), torch.zeros(2, 4, WIDTH))
    assert not plan.chains


def test_branches_that_draw_random_numbers_in_turns_are_left_alone():
    class Two(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.f, self.g, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(rate)

        def forward(self, pair):
            x, y = pair
            a = self.drop(self.f(x))
            b = self.drop(self.g(y))
            a = self.drop(a.tanh())
            return x + a, y + b

    class Net(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.blocks = nn.Sequential(Two(rate), Two(rate))

        def forward(self, x):
            left, right = self.blocks((x, x.flip(0)))
            return left * right

    agrees(lambda: Net(0.0), inputs(), steps=4)
    plan = revwire.plan(Net(0.5), inputs().float())
    assert any("in turns" in skipped.reason for skipped in plan.skipped)
    agrees(lambda: Net(0.5), inputs(), steps=sum(1 for _ in plan.steps)) if plan.chains else None


def test_a_relu_after_the_sum_moves_into_the_branch():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.body(x)
            out += x
            return self.act(out)

    agrees(lambda: nn.Sequential(Block(), Block(), Block()), inputs(), steps=3)
    x = inputs()
    model = nn.Sequential(Block(), Block()).double()
    first, second = (F.relu(block.body(x)) for block in model[:1]), model[1].body
    x1 = x + next(first)
    x2 = x + F.relu(second(x1))
    torch.testing.assert_close(revwire.rewire(model, x)(x), (x1 + x2) / 2)


def test_a_norm_at_the_end_of_the_frame_stays_outside():
    class Normed(Net):
        def __init__(self):
            super().__init__(*(linear() for _ in range(3)))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            return self.norm(super().forward(x))

    agrees(Normed, inputs(), steps=3)
    assert all(step.post is None for step in revwire.plan(Normed(), inputs().float()).steps)


class Shared(nn.Module):
    """A block that goes on using what its branch computed."""

    def __init__(self):
        super().__init__()
        self.body, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, seen):
        hidden = self.body(x).tanh()
        weights = self.gate(hidden).sigmoid()
        energy = (weights * x.flip(0)).square().sum(1)
        return x + hidden * weights, (*seen, energy, hidden.shape[1])


@pytest.mark.parametrize("used", [True, False])
def test_inner_values_of_a_branch_are_handed_out_with_their_gradients(used):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Shared() for _ in range(4))

        def forward(self, x):
            seen = ()
            for block in self.blocks:
                x, seen = block(x, seen)
            return x + sum(e for e in seen[::2]).unsqueeze(1) * seen[1] if used else x

    agrees(Net, inputs(), steps=4)


def test_what_a_branch_handed_out_is_not_kept():
    class Block(Shared):
        def forward(self, x):
            return super().forward(x, ())

    block = revwire.rewire(nn.Sequential(nn.Identity(), Pair(Block)).double(), inputs())
    _, first, second = block(inputs().requires_grad_())
    alive = [weakref.ref(first), weakref.ref(second)]
    del first, second
    assert not any(ref() is not None for ref in alive)


class Pair(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x):
        x, (first, _) = self.first(x)
        x, (second, _) = self.second(x)
        return x, first, second


class PerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * self.scale


SCALED = {
    "number": lambda self, x: 0.9 * x + self.body(x),
    "parameter": lambda self, x: torch.add(self.body(x), x * self.alpha),
    "module": lambda self, x: self.scale(x) + self.body(x),
    "division, then an activation": lambda self, x: F.silu(self.body(x) + x / 2),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_skip(kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = nn.Linear(WIDTH, WIDTH), PerChannel()
            self.alpha = nn.Parameter(torch.tensor(0.8))

        def forward(self, x):
            return SCALED[kind](self, x)

    agrees(lambda: nn.Sequential(Block(), Block(), Block()), inputs(), steps=3)
    x = inputs()
    model = nn.Sequential(Block(), Block()).double()
    x1 = model[0](x)
    x2 = x + model[1](x1) - x1
    torch.testing.assert_close(revwire.rewire(model, x)(x), (x1 + x2) / 2)


@pytest.mark.parametrize("skip", [nn.Sequential, nn.Identity, lambda: nn.Sequential(nn.Identity())])
def test_a_skip_through_modules_that_do_nothing(skip):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shortcut = nn.Linear(WIDTH, WIDTH), skip()

        def forward(self, x):
            out = self.body(x)
            out += self.shortcut(x)
            return out

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=2)
