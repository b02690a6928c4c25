"""Blocks whose sum is not written `x + F(x)` in their own forward: in a child, by pieces, before a norm, in turns."""

import functools
import math
import warnings

import pytest
import torch
from agreement import WIDTH, agrees, inputs, rewired
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from revwire.run.coupling import Original


class AddNorm(nn.Module):
    """As BERT has it: the sum is a child's, of two arguments."""

    def __init__(self):
        super().__init__()
        self.dense, self.drop, self.norm = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.LayerNorm(WIDTH)

    def forward(self, hidden, given):
        return self.norm(self.drop(self.dense(hidden)) + given)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self, self.output = nn.Linear(WIDTH, WIDTH), AddNorm()

    def forward(self, x):
        return self.output(self.self(x).tanh(), x)


def layers(count=3):
    return nn.Sequential(*(Layer() for _ in range(count)))


def test_a_sum_of_a_child_s_two_arguments_and_the_norm_after_it():
    agrees(layers, inputs(), steps=3)
    x, net = inputs(), layers().double().eval()

    def branch(layer, v):
        return layer.output.norm(layer.output.dense(layer.self(v).tanh()))

    previous = current = x
    for layer in net:
        previous, current = current, previous + branch(layer, current)
    torch.testing.assert_close(revwire.rewire(net, x)(x), (previous + current) / 2)


def test_a_child_whose_code_is_part_of_its_caller_is_watched():
    """A hook, or another class, on a child whose forward is not called: the call says that it cannot be rewired."""
    x, net = inputs(), revwire.rewire(layers().double().eval(), inputs(), fallback="original")
    rewired = net(x)
    seen = []
    handle = net[1].output.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="runs the original forward"):
        other = net(x)
    assert seen == [1]
    assert not torch.allclose(other, rewired)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(net(x), rewired)


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


class Append(nn.Sequential):
    def forward(self, x, seen):
        for layer in self:
            x = layer(x)
            seen.append(x)
        return torch.cat(seen, dim=1)


def test_a_child_that_appends_to_a_list_it_is_given():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs, self.join = (
                Append(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))),
                nn.Linear(3 * WIDTH, WIDTH),
            )

        def forward(self, x):
            return self.join(self.convs(x, [x])) + x

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=2)


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


def test_proxies_are_no_tensors_to_torch_s_own_code():
    """`torch.pow(Scalar, Tensor)` asks whether its first argument is a tensor, and would read a proxy's memory."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.body(x)
            assert isinstance(h, torch.Tensor)
            assert not isinstance(h, nn.Parameter)
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
            return x + torch.pow(1.5, h) * torch.clamp(h, min=-1.0)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=2)


@functools.lru_cache(maxsize=8)
def table(width, dtype):
    return torch.linspace(0.5, 1.5, width, dtype=dtype)


def closed_over():
    kept = functools.lru_cache(maxsize=8)(lambda width, dtype: torch.linspace(1, 2, width, dtype=dtype))

    def call(width, dtype):
        return kept(width, dtype)

    return call


other_table = closed_over()


def test_cached_tables_are_none_of_planning_s():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x * table(x.shape[1], x.dtype) + other_table(x.shape[1], x.dtype))

    net, x = nn.Sequential(Block(), Block()).double(), inputs()
    revwire.plan(net, x)
    assert table.cache_info().currsize == 0
    wanted = net(x)
    assert type(table(WIDTH, torch.float64)) is torch.Tensor
    revwire.plan(net, x)
    torch.testing.assert_close(net(x), wanted)


class Memory:
    """An object with a state, as a KV cache is one: what a block is given, adds to and reads."""

    def __init__(self):
        self.items, self.limit = [], 3

    def add(self, item):
        self.items.append(item)
        return torch.stack(self.items[-self.limit :]).mean(0)


def test_an_object_with_a_state_travels_as_an_input():
    class Remember(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, memory):
            return F.silu(memory.add(self.body(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Remember()

        def forward(self, x, memory):
            return x + self.body(x, memory) * memory.limit

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.last = None

        def forward(self, x, memory=None):
            memory = Memory() if memory is None else memory
            for block in self.blocks:
                x = block(x, memory)
            return x

    agrees(Net, inputs(), steps=3)
    net, x = revwire.rewire(Net().double(), inputs()), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (3, 1):
            memory = Memory()
            memory.limit = limit
            first = net(x, memory)
            assert len(memory.items) == 3
            assert all(type(item) is torch.Tensor for item in memory.items)
            again = Memory()
            again.limit = limit
            torch.testing.assert_close(net(x, again), first)
    assert not torch.allclose(net(x), first)
