"""Half precision, loss scaling and memory layouts: no further from the exact gradients than plain autograd is."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.nets import NETS, assert_same, gradients, loss, pair
from tests.helpers.steps import kept

each_net = pytest.mark.parametrize("name", ["vit", "convnext", "resnet"])
HALVES = [torch.bfloat16, torch.float16]


def flat(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def exact(name):
    """The gradients of the recurrence by hand in float64, and the float32 model of the same weights."""
    reference, model, x = pair(name)
    loss(reference(x)).backward()
    return flat(reference), model.float(), x.float()


def assert_no_worse(wanted, plain, found):
    """The distance from the exact gradients, of plain autograd in the same precision and of the rewired model."""
    noise, ours = float((plain - wanted).norm()), float((found - wanted).norm())
    assert 0 < ours <= 1.5 * noise < float(wanted.norm())


@pytest.mark.parametrize("dtype", HALVES)
@each_net
def test_autocast_with_a_gradient_scaler(name, dtype):
    wanted, model, x = exact(name)
    found = []
    for m in (kept(model), model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        with torch.autocast("cpu", dtype=dtype):
            out = m(x)
        scaler.scale(loss(out.float())).backward()
        scaler.unscale_(optimizer)
        found.append(flat(m))
        before = [p.detach().clone() for p in m.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert not all(map(torch.equal, before, m.parameters()))
    assert_no_worse(wanted, *found)


def test_a_step_whose_gradients_overflow_is_left_out():
    _, model, x = pair("vit")
    model.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(x.float())
    scaler.scale(loss(out.float())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("dtype", HALVES)
@each_net
def test_half_precision_parameters(name, dtype):
    """The parameters themselves are narrow; the streams between blocks are float32 all the same."""
    wanted, model, x = exact(name)
    model, plain = model.to(dtype), kept(model.to(dtype))
    for m in (plain, model):
        loss(m(x.to(dtype)).float()).backward()
        assert all(p.grad.dtype == dtype for p in m.parameters())
    assert_no_worse(wanted, flat(plain), flat(model))


@pytest.mark.parametrize("name", ["convnext", "resnet", "convolutions"])
def test_channels_last(name):
    """Numbers of the recurrence by hand, and the layout that the unwired model hands on."""
    reference, model, x = pair(name)
    unwired = copy.deepcopy(reference.net)
    for m in (model, unwired):
        m.to(memory_format=torch.channels_last)
    loss(reference(x)).backward()
    wide = x.to(memory_format=torch.channels_last)
    loss(model(wide)).backward()
    assert_same(gradients(reference), gradients(model))
    layouts = []
    for m in (unwired, model):
        seen = []
        for layer in m.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.append(out.stride()))
        m.eval()(wide)
        layouts.append(seen)
    assert layouts[0] == layouts[1]
    assert len(layouts[0]) >= NETS[name].steps
