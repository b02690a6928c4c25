"""The 22 checks that torch's own checkpoint and every reversible library fail somewhere in, one test each.

On whole timm models and on nets by hand, in float64, against ordinary autograd through the recurrence (`nets.py`).
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import revwire
from tests.helpers.nets import NETS, assert_same, gradients, loss, net_of, pair
from tests.helpers.steps import agree

SEEDS = (0, 1)
each_net = pytest.mark.parametrize("name", NETS)
each_seed = pytest.mark.parametrize("seed", SEEDS)


def layers(model):
    return [m for m in net_of(model).modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def step(model, x):
    x.requires_grad_()
    out = model(x)
    loss(out).backward()
    return out, x.grad


@each_seed
@each_net
def test_basic(name, seed):
    agree(name, step, seed=seed)


@each_net
def test_input_without_grad(name):
    agree(name, lambda model, x: loss(model(x)).backward())


@each_net
def test_the_callers_input_is_kept_intact(name):
    _, model, x = pair(name)
    before, version = x.clone(), x._version
    loss(model(x)).backward()
    assert torch.equal(x, before)
    assert x._version == version


@each_net
def test_a_relu_before_the_chain(name):
    """Its saved output is the chain's input, which must be neither reconstructed inexactly nor written to."""

    def run(model, x):
        x.requires_grad_()
        loss(model(nn.functional.relu(x * 1.0, inplace=True))).backward()
        return (x.grad,)

    agree(name, run)


@each_seed
@each_net
def test_dropout(name, seed):
    agree(name, step, dropout=0.4, seed=seed)


@each_net
def test_global_generator_state_afterwards(name):
    def run(model, x):
        out = model(x)
        between = torch.rand(2)
        loss(out).backward()
        return between, torch.rand(2)

    agree(name, run, dropout=0.4)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.batchnorm])
def test_batchnorm_statistics_move_once(name):
    reference, model = agree(name, lambda model, x: loss(model(x)).backward())
    buffers = dict(model.named_buffers())
    assert any(key.endswith("num_batches_tracked") for key in buffers)
    for key, wanted in reference.net.named_buffers():
        assert torch.equal(buffers[key], wanted), key


@pytest.mark.parametrize("trained", ["every third", "first", "last", "norms"])
@each_net
def test_frozen_parameters(name, trained):
    def run(model, x):
        named = list(model.named_parameters())
        chosen = {
            "every third": named[::3],
            "first": named[: len(named) // 3],
            "last": named[-len(named) // 3 :],
            "norms": [(n, p) for n, p in named if p.ndim == 1],
        }[trained]
        model.requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_()
        loss(model(x)).backward()

    agree(name, run)


@each_net
def test_bf16_autocast_around_the_forward_only(name):
    """No further from the exact gradients than plain autograd under the same autocast is."""
    reference, model, x = pair(name)
    loss(reference(x)).backward()
    exact = torch.cat([g.flatten() for g in gradients(reference)])
    flat = []
    for m in (reference, model):
        m.float().zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(x.float())
        loss(out.double()).backward()
        flat.append(torch.cat([g.flatten().double() for g in gradients(m)]))
    plain, found = ((g - exact).norm() for g in flat)
    assert 0 < found <= 1.5 * plain


@each_net
def test_autograd_grad(name):
    def run(model, x):
        x.requires_grad_()
        found = torch.autograd.grad(loss(model(x)), [x, *model.parameters()], allow_unused=True)
        assert gradients(model) == [None] * len(gradients(model))
        return found

    agree(name, run)


@each_net
def test_double_backward(name):
    def run(model, x):
        x.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # of the forward: the other kernels have no second derivative
            out = model(x)
        (grad,) = torch.autograd.grad(loss(out), x, create_graph=True)
        grad.square().sum().backward()
        return grad, x.grad

    agree(name, run)


@each_net
def test_backward_twice_with_retain_graph(name):
    def run(model, x):
        out = loss(model(x))
        out.backward(retain_graph=True)
        once = [g.clone() for g in gradients(model)]
        out.backward()
        return once

    agree(name, run)


def _two_forwards(order):
    def run(model, x):
        losses = [loss(model(x)), loss(model(x.flip(0) * 0.5))]
        for index in order:
            losses[index].backward()

    return run


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@each_net
def test_two_forwards_before_the_backwards(name, order):
    agree(name, _two_forwards(order))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@each_net
def test_two_forwards_before_the_backwards_with_dropout(name, order):
    agree(name, _two_forwards(order), dropout=0.4)


@each_net
def test_tied_branches(name):
    def run(model, x):
        one, other = NETS[name].parts
        net_of(model).set_submodule(other, net_of(model).get_submodule(one))
        loss(model(x)).backward()

    agree(name, run)


@pytest.mark.parametrize("leaf", [True, False])
@each_net
def test_functional_call_with_other_weights(name, leaf):
    """The module has its own weights back when backward runs, which needs those of the forward."""

    def run(model, x):
        source = {n: p.detach().mul(1.5).requires_grad_() for n, p in model.named_parameters()}
        weights = source if leaf else {n: p * 1.0 for n, p in source.items()}
        out = loss(torch.func.functional_call(model, weights, (x,)))
        del weights
        out.backward()
        assert gradients(model) == [None] * len(gradients(model))
        return [p.grad for p in source.values()]

    agree(name, run)


@each_net
def test_module_hooks(name):
    """Hooks on the layers inside branches that change what goes in and comes out."""

    def run(model, x):
        for layer in layers(model):
            layer.register_forward_pre_hook(lambda _m, args: (args[0] * 0.75,))
            layer.register_forward_hook(lambda _m, _args, out: out.sin())
        loss(model(x)).backward()

    agree(name, run)


@each_net
def test_backward_hooks(name):
    """Hooks on layers and on weights fire once each, in the same order, with the same gradients, and change them."""

    def run(model, x):
        seen = []

        def note(_module, grad_input, grad_output):
            seen.extend(g.clone() for g in grad_output)
            return tuple(None if g is None else g * 0.5 for g in grad_input)

        for layer in layers(model):
            layer.register_full_backward_hook(note)
            layer.register_full_backward_pre_hook(lambda _m, grads: (grads[0] * 1.5,))
            layer.weight.register_hook(lambda grad: grad * 2)
        loss(model(x.requires_grad_())).backward()
        assert len(seen) == len(layers(model))
        return [*seen, x.grad]

    agree(name, run)


@each_net
def test_no_leak_when_the_graph_is_dropped(name):
    """By reference counts alone: nothing waits for the garbage collector, after backward or without one."""
    _, model, x = pair(name, dropout=0.4)
    made = []
    for layer in layers(model):
        layer.register_forward_hook(lambda _m, _args, out: made.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for finish in (lambda out: None, lambda out: loss(out).backward()):
            made.clear()
            out = model(x)
            finish(out)
            made.append(weakref.ref(out))
            del out
            assert len(made) > 3
            assert all(ref() is None for ref in made)
    finally:
        gc.enable()


@each_net
def test_eval_with_grad(name):
    agree(name, step, dropout=0.4, train=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_net
def test_eval_without_grad(name, mode):
    reference, model, x = pair(name, dropout=0.4, train=False)
    with mode():
        wanted, found = reference(x), model(x)
    assert not found.requires_grad
    assert_same([wanted], [found])
    loss(model(x)).backward()  # and nothing of it stays


@each_net
def test_deepcopy(name):
    _, model, x = pair(name)
    model.register_buffer("marker", torch.zeros(1))
    loss(model(x)).backward()
    duplicate = copy.deepcopy(model)
    assert revwire.plan_of(duplicate) == revwire.plan_of(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(0.5)
    wanted = gradients(model)
    model.zero_grad()
    loss(duplicate(x)).backward()  # another model by now: it touches nothing of the first one
    assert gradients(model) == [None] * len(wanted)
    if not NETS[name].batchnorm:
        loss(model(x)).backward()
        assert_same(wanted, gradients(model))
