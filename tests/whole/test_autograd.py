"""Beyond the 22 checks of `test_compatibility.py`: parts of a step, sums of steps, changes and errors in between."""

import copy
import gc
import weakref

import pytest
import torch

import revwire
from revwire import ReplayError
from tests.helpers.nets import NETS, WIDTH, Loop, assert_same, gradients, loss, net_of, pair, x_of
from tests.helpers.steps import agree

each_net = pytest.mark.parametrize("name", NETS)


def part(name, model, index=0):
    """The weights of one branch, or of a layer in one."""
    return list(net_of(model).get_submodule(NETS[name].parts[index]).parameters())


@each_net
def test_all_but_one_branch_frozen(name):
    def run(model, x):
        model.requires_grad_(False)
        for parameter in part(name, model, -1):
            parameter.requires_grad_()
        loss(model(x)).backward()

    agree(name, run)


@each_net
def test_autograd_grad_of_one_branch_alone(name):
    def run(model, x):
        found = torch.autograd.grad(loss(model(x)), part(name, model))
        assert gradients(model) == [None] * len(gradients(model))
        return found

    agree(name, run)


@each_net
def test_weights_changed_in_place_before_backward_raise(name):
    _, model, x = pair(name)
    out = loss(model(x))
    with torch.no_grad():
        part(name, model)[0].mul_(1.1)
    with pytest.raises(ReplayError, match=r"changed in place between forward and backward.*optimizer\.step"):
        out.backward()


@each_net
def test_no_leak_after_an_error_in_backward(name):
    _, model, x = pair(name)

    def fail(_grad):
        raise ValueError("stop")

    handle = part(name, model)[0].register_hook(fail)
    gc.collect()
    gc.disable()
    try:
        out = model(x)
        with pytest.raises(ValueError, match="stop"):
            loss(out).backward()
        handle.remove()
        kept = weakref.ref(out)
        del out
        assert kept() is None
    finally:
        gc.enable()
    model.zero_grad()
    loss(model(x)).backward()


@each_net
def test_gradient_accumulation(name):
    def run(model, x):
        for some in x.chunk(2):
            loss(model(some)).backward()

    agree(name, run)


class Tapped(Loop):
    """Hands out a tap of the trunk from inside of the chain."""

    def forward(self, x):
        attn, ff = self.layers[0]
        x = attn(x) + x
        x = ff(x) + x
        tap = x.sin()
        for attn, ff in self.layers[1:]:
            x = attn(x) + x
            x = ff(x) + x
        return tap, x


@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
def test_losses_on_taps(on):
    """On the tap, on the output, or on both."""
    torch.manual_seed(0)
    net, x = Tapped(depth=3).double(), x_of(4, 5, WIDTH)
    reference, model = copy.deepcopy(net), revwire.rewire(net, x)
    found = model(x)
    previous = current = x
    wanted = []
    for i, branch in enumerate(branch for layer in reference.layers for branch in layer):
        previous, current = current, previous + branch(current)
        if i in {1, 5}:
            wanted.append((previous + current) / 2)
    wanted[0] = wanted[0].sin()
    for outs in (wanted, found):
        sum(loss(outs[i]) for i in on).backward()
    assert_same([*wanted, *gradients(reference)], [*found, *gradients(model)])
