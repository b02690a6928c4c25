"""A branch runs again in backward: under the conditions of its forward, whatever has changed since, and unnoticed."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import revwire
from revwire import ReplayError
from tests.helpers.branches import Net, Reference, Wrapped, agree, linear, mlp, noise, pair
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, x_of
from tests.helpers.steps import kept

# -- buffers and attributes -------------------------------------------------------------------------------------------


class Counting(Wrapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x).tanh() * self.calls.clone()


class CountingInPython(Wrapped):
    calls = 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x).tanh() * self.calls


class Cached(Wrapped):
    def __init__(self):
        super().__init__()
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(WIDTH, dtype=x.dtype).sin()
        return self.layer(x).tanh() * self.table


class Remembering(Wrapped):
    """Keeps its last output, as people do to look at attention maps."""

    last = None

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        self.last = self.layer(x).tanh()
        return self.last * 1.5


class OwnBatchNorm(Wrapped):
    """F.batch_norm moves the statistics of a class that torch does not know, without counting up their version."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x):
        return nn.functional.batch_norm(self.layer(x), self.mean, self.var, training=self.training)


class Blending(OwnBatchNorm):
    """A running average that is also what it computes with."""

    def forward(self, x):
        out = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(out.mean(0), 0.3)
        return (out - self.mean).tanh()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("branch", [Counting, CountingInPython, Cached, Remembering, OwnBatchNorm, Blending])
def test_what_a_module_keeps_moves_once(branch, times):
    def run(net, x):
        for _ in range(times):
            loss(net(x)).backward()

    reference, model = agree(branch, run)
    for ours, theirs in zip(model.branches, reference.branches, strict=True):
        assert getattr(ours, "calls", 0) == getattr(theirs, "calls", 0)


@pytest.mark.parametrize("branch", [Counting, CountingInPython, Blending])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_backward_finds_what_its_own_forward_found(branch, order):
    def run(net, x):
        losses = [loss(net(x)), loss(net(x * 2))]
        for index in order:
            losses[index].backward()

    agree(branch, run)


def test_a_module_that_keeps_its_output_keeps_one_graph_alive():
    _, model = pair(Remembering)
    made = []
    model.branches[0].layer.register_forward_hook(lambda _m, _a, out: made.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            model(noise())
        assert [ref() is not None for ref in made].count(True) <= 1
    finally:
        gc.enable()


def test_eval_statistics_that_move_before_backward():
    def run(net, x):
        if isinstance(net, Reference):
            return loss(net.eval()(x)).backward()
        out = loss(net.eval()(x))
        net.train()(x * 3)
        out.backward()
        return None

    reference, model = pair(lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.Tanh()))
    for net in (reference, model):
        run(net, noise())
    assert_same(gradients(reference), gradients(model))


# -- weights ----------------------------------------------------------------------------------------------------------


class Masked(Wrapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(WIDTH))

    def forward(self, x):
        return (self.layer(x) * self.mask).tanh()


def test_functional_call_with_other_buffers():
    """Also one that wants a gradient."""

    def run(net, x):
        masks = {
            name: x_of(WIDTH, seed=i).requires_grad_() for i, (name, _) in enumerate(net.named_buffers())
        }
        loss(torch.func.functional_call(net, masks, (x,))).backward()
        return [mask.grad for mask in masks.values()]

    agree(Masked, run)


@pytest.mark.parametrize("train", [True, False])
def test_a_buffer_changed_in_place_raises(train):
    _, model = pair(Masked)
    out = loss(model.train(train)(noise()))
    model.branches[1].mask.mul_(2)
    with pytest.raises(ReplayError, match=r"Masked\.mask was changed in place between forward and backward"):
        out.backward()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd, foreach": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
}  # fused ones change weights without counting up their version: plain autograd is silently wrong there too


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_step_before_backward_raises(optimizer):
    _, model = pair(mlp)
    step = OPTIMIZERS[optimizer](model.parameters())
    loss(model(noise())).backward()
    out = loss(model(noise()))
    step.step()
    with pytest.raises(ReplayError, match=r"call backward\(\) before optimizer\.step\(\)"):
        out.backward()


def test_a_frozen_weight_changed_in_place_raises():
    """Nothing but weights is saved by a frozen linear branch: it is not run again, and must be checked all the same."""
    _, model = pair(linear)
    model.requires_grad_(False)
    out = loss(model(noise().requires_grad_()))
    with torch.no_grad():
        model.branches[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        out.backward()


class Gated(Net):
    """Its branches are multiplied with something that comes from beside the trunk."""

    def forward(self, x, gate):
        for branch in self.branches:
            x = x + branch(x) * gate
        return x


def test_a_side_input_changed_in_place_raises():
    x, gate = noise(), x_of(WIDTH, seed=1)
    model = revwire.rewire(Gated(mlp(), mlp(), mlp()).double(), (x, gate))
    out = loss(model(x, gate))
    gate.mul_(2)
    with pytest.raises(ReplayError, match="beside the trunk"):
        out.backward()


@pytest.mark.parametrize("before", [True, False])
def test_weights_frozen_or_thawed_before_backward(before):
    def run(net, x):
        net.branches[1].requires_grad_(before)
        net.branches[0].requires_grad_(not before)
        out = loss(net(x.requires_grad_()))
        net.branches[1].requires_grad_(not before)
        out.backward()
        return (x.grad,)

    reference, model = pair(mlp)
    found = [[*run(net, noise()), *gradients(net)] for net in (reference, model)]
    assert_same(*found)


def test_train_and_eval_mode_are_those_of_the_forward():
    def run(net, x):
        out = loss(net(x))
        net.eval()
        out.backward()

    agree(lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.4)), run)


def test_unwired_before_backward():
    def run(net, x):
        out = loss(net(x))
        if not isinstance(net, Reference):
            revwire.unwire(net)
        out.backward()

    agree(mlp, run)


def test_a_model_cast_before_backward_raises():
    _, model = pair(mlp)
    out = loss(model(noise()))
    model.float()
    with pytest.raises(
        ReplayError, match=r"saves a torch\.float32 .* for a torch\.float64 .* not the same run"
    ):
        out.backward()


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, weight):
        return weight + self.a @ self.b


def parametrized():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", LowRank())
    return nn.Sequential(layer, nn.Tanh())


@pytest.mark.parametrize(
    "branch",
    [
        parametrized,
        lambda: parametrizations.spectral_norm(linear()),
        lambda: parametrizations.weight_norm(linear()),
    ],
)
def test_parametrized_weights(branch):
    def run(net, x):
        for _ in range(2):
            loss(net(x)).backward()

    agree(branch, run)


class FillsACache(nn.Module):
    """In eval mode its table is computed at the first call, and kept: an entry that the second run must not find."""

    def __init__(self):
        super().__init__()
        self.table, self.index, self.cache = nn.Parameter(torch.randn(9, 4)), torch.randperm(9)[:4], {}

    def forward(self, x):
        if self.training or "table" not in self.cache:
            self.cache["table"] = self.table[self.index] * 2
        return torch.tanh(x @ self.cache["table"])


@pytest.mark.parametrize("training", [True, False])
def test_a_cache_filled_in_forward_is_filled_again(training):
    x = torch.randn(3, 4)
    model = revwire.rewire(nn.Sequential(*(Residual(FillsACache()) for _ in range(3))), x).train(training)
    plain = kept(model)
    for net in (model, plain):
        net(x).square().sum().backward()
        assert all(block.body[0].cache["table"].grad_fn is not None for block in net)
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert wanted.grad.norm() > 0
        torch.testing.assert_close(found.grad, wanted.grad)
