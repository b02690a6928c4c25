"""Branches made of anything, called in any way: recurrent, checkpointed, drawing numbers, with custom Functions."""

import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revwire
from revwire import ReplayError
from tests.helpers.branches import Net, Wrapped, agree, linear, mlp, noise, pair
from tests.helpers.nets import WIDTH, assert_same, loss, x_of


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Checkpointing(nn.Module):
    reentrant = False

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh())
        self.outer = Inner(self.inner, self.reentrant)

    def forward(self, x):
        return self.outer(x).sin()


class Inner(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class CheckpointingReentrantly(Checkpointing):
    reentrant = True


class Drawing(Wrapped):
    def forward(self, x):
        return self.layer(x).tanh() * random.random() * torch.rand(1, dtype=x.dtype)


class Seeding(Wrapped):
    """Seeds the global generator itself."""

    def forward(self, x):
        torch.manual_seed(5)
        return self.layer(x).tanh() * torch.rand(WIDTH, dtype=x.dtype)


@pytest.mark.parametrize(
    "branch",
    [Recurrent, Attending, Checkpointing, CheckpointingReentrantly, Drawing, Seeding],
    ids=lambda c: c.__name__,
)
def test_branches_of_many_kinds(branch):
    def run(net, x):
        out = net(x.requires_grad_())
        loss(out).backward()
        return out, x.grad

    agree(branch, run, x_of(3, 5, WIDTH))


class KeepsOnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.x.cos()


class ReadsTwice(KeepsOnContext):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos() + 0 * ctx.saved_tensors[0]


def custom(function):
    class Custom(nn.Linear):
        def forward(self, x):
            return function.apply(super().forward(x))

    return lambda: Custom(WIDTH, WIDTH)


def test_custom_functions_in_branches():
    agree(custom(KeepsOnContext))
    _, model = pair(custom(ReadsTwice))
    with pytest.raises(ReplayError, match=r"fetched twice.*read ctx\.saved_tensors only once"):
        loss(model(noise())).backward()


def test_a_backward_inside_a_branch_raises():
    class Energy(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(super().forward(x).tanh().sum(), x, create_graph=True)[0]

    _, model = pair(lambda: Energy(WIDTH, WIDTH))
    with pytest.raises(ReplayError, match=r"freed by an earlier backward|a backward pass of its own"):
        loss(model(noise().requires_grad_())).backward()


def test_jacobians_batched_and_one_by_one():
    reference, model = pair(mlp)
    for net, found in ((reference, wanted := []), (model, ours := [])):
        found.append(torch.autograd.functional.jacobian(net, noise()))
        x = noise().requires_grad_()
        ones = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
        found.extend(torch.autograd.grad(net(x), x, ones, is_grads_batched=True))
    assert_same(wanted, ours)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, in forward-mode differentiation
def test_forward_mode_differentiation():
    reference, model = pair(mlp)
    wanted, found = (torch.func.jvp(net, (noise(),), (noise(1),)) for net in (reference, model))
    assert_same(wanted, found)


def test_other_saved_tensor_hooks_around():
    def run(net, x):
        with torch.autograd.graph.save_on_cpu():
            out = loss(net(x))
        out.backward()

    agree(mlp, run)


def test_the_whole_model_checkpointed():
    for reentrant in (True, False):

        def run(net, x, reentrant=reentrant):
            loss(checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)).backward()
            return (x.grad,)

        agree(lambda: nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()), run)


def test_backward_under_the_forwards_autocast_leaves_its_cache_usable():
    """A step that a tap's backward runs through without grad must not leave the weights it casts in the cache."""

    class Tapped(Net):
        def forward(self, x):
            taps = []
            for branch in self.branches:
                x = x + branch(x)
                taps.append(x.sum())
            return x, taps

    torch.manual_seed(0)
    x = noise().float()
    model = revwire.rewire(Tapped(*(mlp() for _ in range(4))), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, taps = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taps[1].backward()
        assert model.branches[3][0].weight.grad is None
        model(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
