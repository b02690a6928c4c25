"""Frames as people write them: what a rewritten forward must reproduce, and what it must refuse."""

import random
import warnings
import weakref

import pytest
import torch
from agreement import WIDTH, agrees, inputs
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from revwire import ReplayError
from revwire.rewrite.wired import options_of, with_options
from revwire.run.options import Options


class Written(nn.Module):
    """A net in one forward; subclasses write it."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.scale = nn.Parameter(torch.full((1,), 0.3))


def test_a_loop_in_one_forward():
    class Net(Written):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh() + x
            return x.relu()

    agrees(Net, inputs(), steps=3)


def test_parameters_the_frame_computes_with_keep_their_gradients():
    class Net(Written):
        def forward(self, x):
            for layer in self.layers:
                x = x + torch.sigmoid(self.scale) * layer(x)
            return x

    agrees(Net, inputs(), steps=3)


def test_a_side_input_made_in_the_frame():
    class Net(Written):
        def forward(self, x):
            positions = torch.arange(x.shape[1], dtype=x.dtype) * self.scale
            for layer in self.layers:
                x = x + layer(x * positions)
            return x

    agrees(Net, inputs(), steps=3)
    assert {s for step in revwire.plan(Net(), inputs().float()).steps for s in step.sides}


def test_tuples_dicts_and_shapes_in_between():
    class Attention(nn.Linear):
        def forward(self, x, mask=None):
            out = super().forward(x)
            return (out if mask is None else out * mask), {"norm": out.norm()}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attention(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask=None):
            batch, width = x.shape
            out, extra = self.attn(x, mask=mask)
            assert extra["norm"].shape == ()
            x = x + out.reshape(batch, width)
            x = x.unflatten(1, (2, width // 2)).transpose(1, 2)
            x = x + self.mlp(x.transpose(1, 2).reshape(batch, -1)).reshape(batch, 2, -1).transpose(1, 2)
            return x.transpose(1, 2).flatten(1)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=4)


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
    class Net(Written):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) + x
            return self.norm(x)

    agrees(Net, inputs(), steps=3)
    assert all(step.post is None for step in revwire.plan(Net(), inputs().float()).steps)


def test_functional_dropout_follows_train_and_eval_mode():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + F.dropout(self.body(x), 0.5, self.training)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(64, WIDTH), steps=2)


def test_other_shapes_and_signatures_are_traced_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, gain=None):
            out = self.body(x)
            if gain is not None:
                out = out * gain
            if x.shape[0] > 4:
                out = out.tanh()
            return x + out

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x, gain=None):
            for block in self.blocks:
                x = block(x, gain)
            return x

    model = revwire.rewire(Net().double(), inputs())
    for rows, gain in ((3, None), (5, None), (3, 2.0), (5, torch.tensor(0.5, dtype=torch.float64)), (3, 3.0)):
        x = inputs(rows, WIDTH)

        def branch(v, block, rows=rows, gain=1.0 if gain is None else gain):
            out = block.body(v) * gain
            return out.tanh() if rows > 4 else out

        x1 = x + branch(x, model.blocks[0])
        torch.testing.assert_close(model(x, gain), (x1 + x + branch(x1, model.blocks[1])) / 2)


@pytest.mark.parametrize("given", ["size", "tuple", "list of sizes"])
def test_a_size_as_an_argument_is_traced_once(given):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, sizes):
            return x + self.fc(x) * len(sizes)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            sizes = {"size": x.shape, "tuple": tuple(x.shape), "list of sizes": [x.shape, x.shape]}[given]
            for block in self.blocks:
                x = block(x, sizes)
            return x

    agrees(Net, inputs(), steps=2)
    model = revwire.rewire(Net(), inputs().float())
    for batch in (3, 3, 5, 5, 3):
        model(torch.randn(batch, WIDTH))
    # with the planning run's; a second one for the other batch
    assert len(model.blocks[1].__dict__["_revwire_program"]._variants) == 2


def test_a_call_that_cannot_be_traced_runs_the_original_and_says_so_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, adaptive=False):
            if adaptive and x.sum() > -1e9:
                return x + 2 * self.body(x)
            return x + self.body(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x, adaptive=False):
            for block in self.blocks:
                x = block(x, adaptive)
            return x

    x, net = inputs(), Net().double()
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


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def setattr_and_return(module, value):
    module.last = value
    return value


def without_grad(body, x):
    with torch.no_grad():
        return body(x)


def through_a_view(module, x):
    hidden = torch.cat([module.body(x), x], dim=1)
    part = hidden[:, :WIDTH]
    part += x
    return hidden[:, 1 : WIDTH + 1]


REFUSED = {
    "changes a tensor in place that its branch is given": lambda self, x: (
        x + torch.ones(3, WIDTH).mul_(self.body(x))
    ),
    "adds to a part of a larger tensor in place": through_a_view,
    "stores a value on the module": lambda self, x: x + setattr_and_return(self, self.body(x)),
    "under a context of its own": lambda self, x: x + without_grad(self.body, x),
    "draws Python random numbers": lambda self, x: x + self.body(x) * random.random(),
    "decides by the numbers in a tensor": lambda self, x: x + self.body(x) if x.sum() > 0 else x,
    "autograd.Function": lambda self, x: x + Doubled.apply(self.body(x)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_graph_would_not_reproduce_is_refused_with_its_reason(reason):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

    Block.forward = REFUSED[reason]
    model = nn.Sequential(Block(), Block())
    plan = revwire.plan(model, torch.randn(3, WIDTH))
    assert not plan.chains
    assert any(reason in skipped.reason for skipped in plan.skipped), plan.skipped
    with pytest.raises(revwire.RewireError, match="no two residual blocks"):
        revwire.rewire(model, torch.randn(3, WIDTH))


def test_a_child_that_changes_its_input_in_place_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return x + self.body(x)

    plan = revwire.plan(nn.Sequential(Block(), Block()), torch.randn(3, WIDTH))
    assert not plan.chains
    assert "adds what its branch has changed in place" in plan.skipped[0].reason


def test_changes_in_place_are_followed_whatever_name_is_used_after_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act = nn.Linear(WIDTH, WIDTH), nn.Hardswish(inplace=True)

        def forward(self, x):
            out = self.body(x)
            out.mul_(0.5)
            part = out[:, 1:]
            part += 0.1
            out[0] = out[1] * 2
            self.act(part)
            return out * 0.7 + x

    agrees(lambda: nn.Sequential(Block(), Block(), Block()), inputs(), steps=3)


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


def test_a_branch_that_starts_to_change_its_input_in_place_raises():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.body = nn.ReLU(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(self.act(x))

    model = revwire.rewire(nn.Sequential(Block(), Block()), torch.randn(3, WIDTH))
    model[1].act = nn.ReLU(inplace=True)
    with pytest.raises(ReplayError, match="changes its input in place"):
        model(torch.randn(3, WIDTH, requires_grad=True))


def test_a_child_replaced_later_is_the_one_that_runs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x)

    x = inputs()
    model = revwire.rewire(nn.Sequential(Block(), Block()).double(), x)
    model[1].body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
    x1 = x + model[0].body(x)
    torch.testing.assert_close(model(x), (x1 + x + model[1].body(x1)) / 2)


def test_layers_dropped_at_random_leave_the_rest_rewired():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x):
            for block in self.blocks:
                if self.training and random.random() < 0.5:
                    continue
                x = block(x)
            return x

    x = inputs()
    model = revwire.rewire(Net().double(), x).train()
    assert len(revwire.plan_of(model).chains[0].steps) == 6
    for seed in range(5):
        random.seed(seed)
        out = model(x.clone().requires_grad_())
        random.seed(seed)
        previous = current = x
        for block in model.blocks:
            if random.random() >= 0.5:
                previous, current = current, previous + block.body(current)
        torch.testing.assert_close(out, (previous + current) / 2)
        assert type(out) is torch.Tensor


def test_a_block_called_several_times():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x).tanh()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(self.block(x)))

    agrees(Net, inputs(), steps=3)


def test_dropout_between_blocks_leaves_the_chain_in_the_plan_as_when_it_runs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x)

    model = nn.Sequential(Block(), Block(), nn.Dropout(0.5), Block(), Block(), nn.Identity(), Block())
    plan = revwire.plan(model, torch.zeros(3, WIDTH))
    assert [[step.module for step in chain.steps] for chain in plan.chains] == [["0", "1"], ["3", "4", "6"]]


def test_a_forward_replaced_on_the_object_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x)

    model = nn.Sequential(Block(), Block())
    model[1].forward = model[1].forward
    with pytest.raises(revwire.RewireError, match="1: its forward was replaced on the object"):
        revwire.rewire(model, torch.zeros(3, WIDTH))
    assert not hasattr(type(model[0]), "revwire_original")


def test_a_block_without_grad_in_the_midst_of_a_chain():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.body(x).tanh()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(5))

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                with torch.set_grad_enabled(i != 2):
                    x = block(x)
            return x

    x = inputs()
    model = revwire.rewire(Net().double(), x)
    gradients = []
    for replay in (False, True):
        copy = with_options(model, Options(options_of(model).coupling, replay))
        inner = x.clone().requires_grad_()
        copy(inner).square().sum().backward()
        gradients.append([inner.grad, *(p.grad for p in copy.parameters())])
    for kept, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, kept)
