"""What a branch depends on beside its modules: generators, found where code can draw from them; autocast's cache.

No name of this file leads to a generator but by way of `drawn`.
"""

import pytest
import torch
from torch import nn

import revwire
from revwire.measure import live_bytes
from revwire.run import ambient
from tests.helpers import drawing
from tests.helpers.drawing import drawn

WIDTH, DEPTH = 8, 3


class Drawn(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh() * drawn()


class Block(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def net(body, width=WIDTH):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(body(width, width)) for _ in range(DEPTH)))


def test_a_generator_behind_an_imported_function_is_put_back():
    found, x = [], torch.randn(4, WIDTH)
    for keep in ("*", None):
        model = revwire.rewire(net(Drawn), x, keep=keep)
        drawing.start_over()
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for wanted, one in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted)


def test_a_file_is_looked_into_once(monkeypatch):
    """Its functions are of the same file."""
    looked = []
    monkeypatch.setattr(ambient, "_drawn_from", lambda value: looked.append(value) or [])
    ambient._generators_of(type("New", (nn.Module,), {"__module__": drawing.__name__}))
    assert len(looked) == len(vars(drawing))


def test_a_devices_own_generator_is_put_back(monkeypatch):
    class Device:
        state = torch.tensor([7])

        def get_rng_state(self, device):
            assert device.index == 1
            return self.state

        def set_rng_state(self, state, device):
            assert device.index == 1
            self.state = state

    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    cpu, own = ambient.torch_states(torch.device("cuda", 1))
    assert not own.moved()
    device.state = torch.tensor([8])
    assert own.moved()
    assert not cpu.moved()
    with own.restored():
        assert device.state == 7
        device.state = torch.tensor([9])
    assert device.state == 8


def test_no_weight_that_autocast_casts_is_held():
    x = torch.randn(1, 64)
    model = revwire.rewire(net(nn.Linear, 64), x)
    model(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        with live_bytes.LiveBytes() as meter:
            out = model(x)
            assert meter.live < 64 * 64 * 2
        assert torch.is_autocast_cache_enabled()  # whoever comes next may count on it
    out.float().sum().backward()


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_the_precision_of_products_is_put_back_and_comes_back(wanted):
    seen, x = [], torch.randn(4, WIDTH)
    model = revwire.rewire(net(nn.Linear), x)
    for block in model:
        block.body.register_forward_hook(lambda *_: seen.append(ambient.Float32.now()))
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(wanted)
        loss = model(x).square().sum()
        for other in {"highest", "high", "medium"} - {wanted}:
            torch.set_float32_matmul_precision(other)
            between = ambient.Float32.now()
            loss.backward(retain_graph=True)
            assert ambient.Float32.now() == between
    finally:
        torch.set_float32_matmul_precision(was)
    assert len(seen) == 3 * DEPTH
    assert len(set(seen)) == 1
