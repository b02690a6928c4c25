"""A rewritten forward holds for the calls that agree with the traced one; any other is traced, or runs the original."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from tests.helpers.agreement import WIDTH, Bodied, InTurn, agrees, inputs, post_norm
from tests.helpers.nets import assert_same, recur
from tests.helpers.variants import variants


def test_other_shapes_and_signatures_are_traced_again():
    class Block(Bodied):
        def forward(self, x, gain=None):
            out = self.body(x)
            if gain is not None:
                out = out * gain
            if x.shape[0] > 4:
                out = out.tanh()
            return x + out

    model = revwire.rewire(InTurn(Block(), Block()).double(), inputs())
    for rows, gain in ((3, None), (5, None), (3, 2.0), (5, torch.tensor(0.5, dtype=torch.float64)), (3, 3.0)):
        x = inputs(rows, WIDTH)

        def branch(v, block, rows=rows, gain=1.0 if gain is None else gain):
            out = block.body(v) * gain
            return out.tanh() if rows > 4 else out

        x1 = x + branch(x, model.blocks[0])
        torch.testing.assert_close(model(x, gain), (x1 + x + branch(x1, model.blocks[1])) / 2)


@pytest.mark.parametrize("given", ["size", "tuple", "list of sizes"])
def test_a_size_as_an_argument_is_traced_once(given):
    class Block(Bodied):
        def forward(self, x, sizes):
            return x + self.body(x) * len(sizes)

    class Net(InTurn):
        def forward(self, x):
            sizes = {"size": x.shape, "tuple": tuple(x.shape), "list of sizes": [x.shape, x.shape]}[given]
            return super().forward(x, sizes)

    def make():
        return Net(Block(), Block())

    agrees(make, inputs(), steps=2)
    model = revwire.rewire(make(), inputs().float())
    known = sum(variants(model))
    for batch in (3, 3, 5, 5, 3):
        model(torch.randn(batch, WIDTH))
    # for the other batch, once for each block
    assert sum(variants(model)) == known + 2


def test_a_call_that_cannot_be_traced_runs_the_original_and_says_so_once():
    class Block(Bodied):
        def forward(self, x, adaptive=False):
            if adaptive and x.sum() > -1e9:
                return x + 2 * self.body(x)
            return x + self.body(x)

    x, net = inputs(), InTurn(Block(), Block()).double()
    wanted = net(x, True)
    model = revwire.rewire(net, x, fallback="original")
    with pytest.warns(
        UserWarning, match="runs the original forward: its forward decides by the numbers"
    ) as caught:
        torch.testing.assert_close(model(x, True), wanted)
    assert len(caught) == 2  # one a block
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, True)


def test_a_child_whose_code_is_part_of_its_caller_is_watched():
    """A hook, or another class, on a child whose forward is not called: the call says that it cannot be rewired."""
    x, net = inputs(), revwire.rewire(post_norm().double().eval(), inputs(), fallback="original")
    wanted = net(x)
    seen = []
    handle = net[1].output.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="runs the original forward"):
        other = net(x)
    assert seen == [1]
    assert not torch.allclose(other, wanted)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(net(x), wanted)


class Memory:
    """An object with a state, as a KV cache is one: what a block is given, adds to and reads."""

    def __init__(self):
        self.items, self.limit = [], 3

    def add(self, item):
        self.items.append(item)
        return torch.stack(self.items[-self.limit :]).mean(0)


def test_an_object_with_a_state_travels_as_an_input():
    class Remember(Bodied):
        def forward(self, x, memory):
            return F.silu(memory.add(self.body(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Remember()

        def forward(self, x, memory):
            return x + self.body(x, memory) * memory.limit

    class Net(InTurn):
        def __init__(self):
            super().__init__(*(Block() for _ in range(3)))

        def forward(self, x, memory=None):
            return super().forward(x, Memory() if memory is None else memory)

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


class Settings:
    """An object that a block is given and reads plain attributes of, its own and those of what it holds."""

    def __init__(self, gain=1.0, power=1, name="tanh"):
        self.gain, self.inner, self.items = gain, Inner(power, name), []


class Inner:
    def __init__(self, power, name):
        self.power, self.name, self.items = power, name, []


def test_attributes_of_an_object_count():
    """They are constants of a rewritten forward: a call with others is traced again, and one with the same is not."""

    class Block(Bodied):
        def forward(self, x, settings):
            return x + settings.gain * self.branch(x, settings.inner)

        def branch(self, x, inner):
            out = self.body(x) ** inner.power
            return out.tanh() if inner.name == "tanh" else out

    x = inputs()
    torch.manual_seed(0)
    model = revwire.rewire(InTurn(Block(), Block(), Block()).double(), (x, Settings()))
    changed = Settings()
    calls = [
        (Settings(), 0),
        (Settings(gain=3.0), 3),
        (Settings(power=2), 3),
        (Settings(name="none"), 3),
        (Settings(gain=3.0), 0),
        (changed, 0),
    ]
    for settings, traced in calls:
        known = sum(variants(model))
        found = model(x, settings)
        assert_same([recur(x, branches(model, settings))], [found])
        assert sum(variants(model)) == known + traced
    changed.inner.power = 3  # the same object, by now another
    assert_same([recur(x, branches(model, changed))], [model(x, changed)])


def branches(model, settings):
    return [lambda x, block=block: settings.gain * block.branch(x, settings.inner) for block in model.blocks]
