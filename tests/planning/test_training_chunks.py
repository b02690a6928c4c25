"""`chunks` is proven in train mode too: what mixes samples there, and what a branch leaves on modules, is not cut.

Where a branch is cut, the reference is the same recurrence with branches run whole, in float64 and in the same mode.
"""

from collections import deque

import pytest
import torch
from timm.layers import DropPath, EvoNorm2dB0, EvoNorm2dB2
from torch import nn
from torch.nn import functional

import revwire
from revwire.errors import RewireError
from tests.helpers.nets import assert_same

CHANNELS = 8


class OwnNorm(nn.Module):
    """What BatchNorm computes, without its class."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        return functional.batch_norm(x, self.mean, self.var, training=self.training)


class Whitened(nn.Module):
    def __init__(self, _):
        super().__init__()

    def forward(self, x):
        return x - x.mean(0, keepdim=True) if self.training else x


def spectral(channels):
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))


class Stats:
    def __init__(self):
        self.calls = 0


class Keeps(nn.Module):
    """Leaves something behind; what, is up to `how`."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.seen, self.table, self.recent, self.stats = [], {}, deque(maxlen=2), Stats()
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x):
        y = torch.tanh(self.conv(x))
        loss = y.mean().square()
        {
            "attribute": lambda: setattr(self, "loss", loss),
            "number": lambda: setattr(self, "calls", getattr(self, "calls", 0) + 1),
            "batch": lambda: setattr(self, "batch", len(x)),
            "list": lambda: self.seen.append(1),
            "dict": lambda: self.table.update(loss=loss),
            "deque": lambda: self.recent.append(len(x)),
            "object": lambda: setattr(self.stats, "calls", self.stats.calls + 1),
            "buffer": lambda: self.total.add_(1),
            "data": lambda: self.total.data.mul_(0.5).add_(loss.detach()),
        }[self.how]()
        return y


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), inner

    def forward(self, x):
        return x + self.inner(self.conv(x))


def net(make, depth=3):
    return nn.Sequential(*(Block(make()) for _ in range(depth)))


def inputs():
    return torch.randn(4, CHANNELS, 6, 6)


@pytest.mark.parametrize("norm", [EvoNorm2dB0, EvoNorm2dB2, OwnNorm, Whitened])
def test_norms_that_mix_samples_in_training_alone_are_not_cut(norm):
    with pytest.raises(RewireError, match="in training its slices do not come out as they do in the whole"):
        revwire.rewire(net(lambda: norm(CHANNELS)), inputs(), chunks=2)


def test_a_power_iteration_moves_once_a_forward():
    with pytest.raises(
        RewireError, match=r"chunks: .*_u.* each slice would do it again|in training its slices"
    ):
        revwire.rewire(net(lambda: spectral(CHANNELS)), inputs(), chunks=2)


KINDS = ["attribute", "number", "batch", "list", "dict", "deque", "object", "buffer", "data"]


@pytest.mark.parametrize("how", KINDS)
def test_what_a_branch_leaves_on_a_module_is_left_once(how):
    with pytest.raises(
        RewireError, match=r"changes what its modules hold .*, and each slice would do it again"
    ):
        revwire.rewire(net(lambda: Keeps(how)), inputs(), chunks=2)


def test_the_others_are_cut_and_the_plan_says_why_not_these():
    model = nn.Sequential(*(Block(inner) for inner in (nn.Tanh(), Whitened(0), Keeps("number"), nn.Tanh())))
    plan = revwire.plan(model, inputs(), chunks=2)
    assert [step.slices for step in plan.steps] == [2, 1, 1, 2]
    reasons = [skipped.reason for skipped in plan.unsliced]
    assert "in training" in reasons[0]
    assert "calls" in reasons[1]


def test_a_norm_in_the_frame_s_own_code():
    """The code of eval mode has `training=False` written into it."""

    class Own(OwnNorm):
        def __init__(self):
            super().__init__(CHANNELS)
            self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

        def forward(self, x):
            return x + functional.batch_norm(
                self.conv(x), self.mean.detach(), self.var.detach(), training=self.training
            )

    with pytest.raises(RewireError, match="its slices do not come out"):
        revwire.rewire(nn.Sequential(*(Own() for _ in range(3))), inputs(), chunks=2)


class Cached(nn.Module):
    """Keeps a table for each size that comes, as rope and relative positions do."""

    def __init__(self):
        super().__init__()
        self.tables = {}

    def forward(self, x):
        if (key := (x.shape[0], x.shape[-1])) not in self.tables:
            self.tables[key] = torch.linspace(0, 1, key[1])
        return x * self.tables[key].to(x)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return functional.dropout(x.tanh(), 0.4, self.training)


@pytest.mark.parametrize(
    "make", [nn.Tanh, Cached, lambda: nn.Dropout(0.5), FunctionalDropout, lambda: DropPath(0.5)]
)
def test_what_keeps_tables_and_drops_is_cut(make):
    plan = revwire.plan(net(make), inputs(), chunks=2)
    assert [step.slices for step in plan.steps] == [2, 2, 2]
    assert not plan.unsliced


@pytest.mark.parametrize("reads_all", [False, True])
def test_attention_in_slices_is_proven_in_training(reads_all):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            if self.training and reads_all:
                weights = weights * weights.mean(1, keepdim=True)
            return x + weights @ v

    model = nn.Sequential(*(Attention() for _ in range(2)))
    plan = revwire.plan(model, torch.randn(1, 12, CHANNELS), chunks=4)
    assert [step.inside for step in plan.steps] == [not reads_all] * 2


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_slices_are_proven_whatever_the_default_dtype(default):
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(CHANNELS, CHANNELS)

        def forward(self, x):
            return x + self.lin(x) @ torch.eye(CHANNELS)  # of the dtype that is the default

    torch.set_default_dtype(default)
    try:
        model, x = nn.Sequential(*(Makes() for _ in range(3))), torch.randn(6, CHANNELS)
        plan = revwire.plan(model, x, chunks=2)
        assert [step.slices for step in plan.steps] == [2, 2, 2]
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, mask):
        return x + self.lin(x).tanh() * mask


class Sided(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x


def masks(rows):
    return torch.rand((), dtype=torch.float64) if rows is None else torch.rand(rows, 1, dtype=torch.float64)


@pytest.mark.parametrize(("batch", "planned"), [(6, 6), (6, 1), (6, None), (1, 1), (1, None)])
def test_sides_of_one_row_or_no_dimension_serve_all_samples(batch, planned):
    """However many rows a side input had in planning, it may have another number when the model runs."""
    model = Sided().double()
    x = torch.randn(batch, CHANNELS, dtype=torch.float64)
    revwire.rewire(model, (x, masks(planned)), chunks=3)
    whole = revwire.rewire(Sided().double(), (x, masks(planned)))
    whole.load_state_dict(model.state_dict())
    x = torch.randn(6, CHANNELS, dtype=torch.float64)
    for rows in (6, 1, None):
        for training in (False, True):
            mask = masks(rows)
            wanted, found = (m.train(training)(x, mask) for m in (whole, model))
            assert_same([found], [wanted])
            gradients = []
            for m, out in ((whole, wanted), (model, found)):
                m.zero_grad()
                out.square().sum().backward()
                gradients.append([p.grad for p in m.parameters()])
            assert_same(*gradients)
