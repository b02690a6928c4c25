"""Buffers where comparing numbers would wait for a device: no copy is held of those that stay as they are."""

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from revwire.run import state
from tests.helpers.nets import Residual
from tests.helpers.steps import held, kept

WIDTH, DEPTH = 6, 4
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(autouse=True)
def _everything_is_on_a_device(monkeypatch):
    monkeypatch.setattr(state, "_is_far", lambda tensor: True)


class Masked(nn.Module):
    """Reads a mask that never changes."""

    def __init__(self, size=WIDTH):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.randn(size, WIDTH))

    def forward(self, x):
        return self.linear(x).tanh() * self.mask[0]


class Averaged(Masked):
    """Moves its buffer as F.batch_norm does, in training: without a word."""

    def forward(self, x):
        y = self.linear(x)
        if self.training:
            self.mask.data = 0.5 * self.mask.data + y.detach().mean(0)
        return y.tanh() * self.mask[0]


class Counted(Masked):
    """Moves its buffer in place."""

    def forward(self, x):
        self.mask.add_(0.25)
        return self.linear(x).tanh() * self.mask[0].clone()


def net(kind, *size):
    return nn.Sequential(*(Residual(kind(*size)) for _ in range(DEPTH)))


def gradients(model, x, steps=3):
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        model.zero_grad()
        model(x).square().sum().backward()
        found += [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [Masked, Averaged, Counted])
def test_gradients_and_buffers_are_those_with_everything_kept(block, training):
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    model = revwire.rewire(net(block).double(), x).train(training)
    wanted = gradients(kept(model), x)
    for one, other in zip(gradients(model, x), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_no_copy_of_what_stays_is_held():
    x = torch.randn(5, WIDTH)
    found = []
    for size in (1, 100):
        model = revwire.rewire(net(Masked, size), x)
        found.append(held(model, x))
    assert found[0] == found[1]


@pytest.mark.parametrize("before", [0, 1])
def test_a_change_between_forward_and_backward_is_found_out(before):
    x = torch.randn(5, WIDTH)
    model = revwire.rewire(net(Masked, 50), x)
    for _ in range(before):
        model(x).sum().backward()
    wanted = gradients(kept(model), x, 1)[: 2 * DEPTH]
    model.zero_grad()
    loss = model(x).square().sum()
    model[2].body[0].mask.data[-1, -1] += 1e-7 if before else 1.0  # which no output tells of
    if before:
        with pytest.raises(ReplayError, match=r"2#0, Masked\.mask: .*other numbers"):
            loss.backward()
    else:  # the copy of the first forward is put back
        loss.backward()
        for parameter, one in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, one)


def test_with_the_check_off_nobody_looks():
    x = torch.randn(5, WIDTH)
    model = revwire.rewire(net(Masked), x, check=False)
    model(x).sum().backward()
    loss = model(x).square().sum()
    model[2].body[0].mask.data[-1, -1] += 1.0
    loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_bits_tells_any_change(dtype):
    tensor = torch.randn(7, 3).mul(10).to(dtype)
    was = state._sum_of_bits(tensor)
    assert torch.equal(was, state._sum_of_bits(tensor.clone()))
    for at in range(tensor.numel()):
        other = tensor.clone()
        flat = other.view(-1)
        flat[at] = ~flat[at] if dtype == torch.bool else flat[at] * 1.01 + 1
        assert not torch.equal(was, state._sum_of_bits(other))
