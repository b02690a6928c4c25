"""Nets as people write them: each is rewired, is the same network, and has plain autograd's gradients."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from tests.helpers.agreement import WIDTH, agrees, assert_replayed_as_kept, inputs


class FeedForward(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = FeedForward()

    def forward(self, x):
        return x + self.body(x)


def test_a_transformer_in_one_loop():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(3))

        def forward(self, x):
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
            return x

    agrees(Transformer, inputs(2, 4, WIDTH), steps=6)


def test_blocks_called_by_index_with_features_tapped():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            features = {}
            for i in range(len(self.blocks)):
                x = self.blocks[i](x)
                if i % 2:
                    features[f"level{i}"] = x
            return features

    agrees(Net, inputs(), steps=4)


class UNet(nn.Module):
    """Down, up, and skips that leave the chain."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.down = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(2))
        self.up = nn.ModuleList(nn.Sequential(Block(), Block(), Block()) for _ in range(2))
        self.merge = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        for stage, merge in zip(self.up, self.merge, strict=True):
            x = x.repeat_interleave(2, dim=1)
            skip = skips.pop()
            x = merge(torch.cat([x, skip], dim=-1)) if self.join == "cat" else x + skip
            x = stage(x)
        return x


# a skip that is added makes all in between its branch: an outer residual, which counts
@pytest.mark.parametrize(("join", "steps"), [("cat", 10), ("add", 2 + 1 + 3)])
def test_a_u_shaped_net(join, steps):
    agrees(lambda: UNet(join), inputs(2, 4, WIDTH), steps=steps)


def test_layer_drop_while_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                if not self.training or torch.rand(()).item() >= 0.5:
                    x = layer(x)
            return x

    model, x = revwire.rewire(Net().double(), inputs()), inputs()
    assert [len(chain.steps) for chain in revwire.plan_of(model).chains] == [6]
    for seed in (0, 1, 2, 4):  # 3 drops all layers
        assert_replayed_as_kept(model.train(), x, seed)


class Biased(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.fc, self.bias, self.order = nn.Linear(8, 8), nn.Parameter(torch.randn(8)), order

    def forward(self, x):
        out = self.fc(x).tanh()
        if self.order == "branch first":
            return x + (out + self.bias)
        if self.order == "bias first":
            return x + (self.bias + out)
        return x + out + self.bias


@pytest.mark.parametrize("order", ["branch first", "bias first"])
def test_a_branch_that_ends_in_a_bias(order):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Biased(order) for _ in range(4))), torch.randn(3, 8)
    assert len(list(revwire.plan(model, x).steps)) == 4
    report = revwire.verify(model, x)
    assert report.ok, report


def test_a_bias_added_after_the_sum_leaves_the_chain():
    """As any other sum of the merged trunk; what it computes is the same."""
    model, x = nn.Sequential(*(Biased("after") for _ in range(4))), torch.randn(3, 8)
    assert not revwire.plan(model, x).chains


def test_shared_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            for _ in range(3):
                x = self.second(self.first(x))
            return x

    agrees(Net, inputs(), steps=6)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights = self.score(x).softmax(-1)
        return x + weights * self.value(x), weights


def test_a_block_with_two_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(TwoOutputs() for _ in range(3))

        def forward(self, x):
            maps = []
            for block in self.blocks:
                x, weights = block(x)
                maps.append(weights)
            return x, torch.stack(maps)

    agrees(Net, inputs(), steps=3)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list[torch.Tensor]
    loss: torch.Tensor | None = None


class Wrapped(nn.Module):
    """A net that returns a dataclass, whose trunk it hands out as it comes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        hidden = [x]
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return Output(x, hidden)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Wrapped(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        out = self.inner(x)
        return Output(self.head(out.logits), out.hidden)


@pytest.mark.parametrize("net", [Wrapped, Outer])
def test_a_model_that_returns_a_dataclass(net):
    agrees(net, inputs(), steps=3, read=lambda out: (out.logits, out.hidden, out.loss))
    model = revwire.rewire(net().double(), inputs())
    out = model(inputs())
    assert type(out) is Output
    assert all(type(t) is torch.Tensor for t in (out.logits, *out.hidden))


class Frozen(nn.Module):
    """A net whose first two blocks do not train."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.blocks[:2].requires_grad_(requires_grad=how != "frozen")

    def forward(self, x):
        with torch.set_grad_enabled(self.how != "no_grad"):
            for block in self.blocks[:2]:
                x = block(x)
        for block in self.blocks[2:]:
            x = block(x)
        return x


@pytest.mark.parametrize("how", ["frozen", "no_grad"])
def test_the_first_blocks_do_not_train(how):
    model, x = revwire.rewire(Frozen(how).double(), inputs()), inputs()
    gradients = assert_replayed_as_kept(model.train(), x)
    assert None in gradients.values()


def test_submodules_in_different_modes():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body, self.drop = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

        def forward(self, x):
            return x + self.drop(self.body(self.norm(x)).tanh())

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(*(Noisy() for _ in range(4)))

        def train(self, mode=True):
            super().train(mode)
            for block in self:
                block.norm.eval()
            self[1].drop.eval()
            return self

    agrees(Net, inputs(8, WIDTH), steps=4)
