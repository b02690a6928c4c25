"""Exact streams: every input comes back bit for bit, gradients are those of the rounded recurrence, to the bit."""

import copy
import gc
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import Grid, RewireError
from revwire.measure.live_bytes import LiveBytes
from revwire.rewrite.wired import options_of, plan_of
from revwire.run import watch
from revwire.run.exact import dropped_bits
from revwire.run.recurrence import Weights
from tests.helpers import couplings
from tests.helpers.branches import Net
from tests.helpers.couplings import RULES, WIDTH, Block, Trunk, noise, rewired
from tests.helpers.nets import gradients, loss
from tests.helpers.steps import kept


def equal(wanted, found):
    return all(torch.equal(w, f) for w, f in zip(wanted, found, strict=True) if w is not None)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("depth", [12, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (48, 200))])
@pytest.mark.parametrize("name", RULES)
def test_every_input_comes_back_and_gradients_are_plain_autograds(name, depth, bfloat16):
    torch.manual_seed(depth)
    net, x, bits = Trunk(depth).train(), noise(), 12
    net.requires_grad_()
    for block in net.blocks:  # a trunk that grows with depth stays within the grid
        block.body[-1].weight.data.mul_(0.3)
    model = rewired(name, copy.deepcopy(net), x, exact=Grid(bits))
    torch.manual_seed(1)
    plain = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        states, wanted = couplings.reference(name, net.blocks, plain, bits)
    loss(wanted.float()).backward()
    results = [[wanted, plain.grad, *gradients(net), torch.rand(1)]]
    calls = []
    for block in model.blocks:
        block.body[0].register_forward_pre_hook(lambda _, a: calls.append(a[0].detach().clone()))
    torch.manual_seed(1)
    inner = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = model(inner)
    loss(out.float()).backward()
    results.append([out, inner.grad, *gradients(model), torch.rand(1)])
    given_forward, given_backward = calls[:depth], calls[depth:]
    assert all(r is None or r.isfinite().all() for r in results[0])
    assert equal(*results)
    assert len(given_forward) == len(given_backward) == depth
    assert equal(states[:-1], given_forward)
    for forward, backward in zip(given_forward, reversed(given_backward), strict=True):
        assert torch.equal(forward.view(torch.int32), backward.view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(-3, 14),
    st.sampled_from([1.0, -1.0, *(s * 2.0**-k for k in range(1, 9) for s in (1, -1))]),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(0, 2**31),
    st.sampled_from([(1,), (7,), (8,), (3, 5), (2, 3, 11), (0, 4)]),
)
def test_a_step_and_back(dtype, bits, a, b, c, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    grid, weights = Grid(bits), Weights(a, b, c)
    previous, current = (
        torch.randint(-(2**9), 2**9, shape, generator=generator, device="cpu").to(dtype) * 2.0**-bits
        for _ in range(2)
    )
    branch = 3 * torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    k = round(-math.log2(abs(a)))
    with LiveBytes() as meter:
        following, back = grid.advance(weights, k, previous, current, branch, keep=True)
        assert meter.live == following.nbytes + k * math.ceil(
            following.numel() / 8
        )  # k bits a value are packed
    exact = a * previous.double() + b * current.double() + c * branch.double()
    assert torch.equal(following * 2.0**bits, (following * 2.0**bits).round())  # on the grid
    assert ((following.double() - exact).abs() < 1.51 * 2.0**-bits).all()
    found = back.retreat(following, current, branch)
    assert torch.equal(found, previous)
    assert not (found.signbit() & (found == 0)).any()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("re2tal", 0), ("dr2net (0, 1)", 0), ("bdia", 1), ("momentum", 1), ("own", 2), ("dr2net", 3)],
)
def test_extra_bytes_a_step(name, bits):
    x, held = torch.randn(64, 32, WIDTH), {}
    for exact in (False, Grid(12)):
        for depth in (8, 24):
            model = rewired(name, Trunk(depth), x, exact=exact).train()
            meter = LiveBytes()
            with meter:
                out = model(x)
                held[exact, depth] = meter.live
            del out
    trunk = x.numel() * 4
    growth = [(held[exact, 24] - held[exact, 8]) / 16 / trunk for exact in (False, Grid(12))]
    assert growth[1] - growth[0] == pytest.approx(bits / 32, abs=1e-3)


def test_the_grid_follows_what_enters():
    for scale in (1e-6, 1.0, 3e4):
        x = scale * torch.randn(100)
        grid = Grid.around(x)
        assert 2.0**24 / 2 <= 2**8 * float(x.abs().max()) * 2.0**grid.bits * 2 <= 2.0**25
        assert float((grid.round(x) - x).abs().max()) <= 2.0 ** -(grid.bits + 1)
    assert Grid.around(torch.zeros(3)).bits == Grid.around(torch.full((3,), math.nan)).bits
    assert Grid.around(torch.ones(3, dtype=torch.float64)).bits > Grid.around(torch.ones(3)).bits


class Loud(nn.Module):
    """A branch whose values leave any grid that is chosen for what enters."""

    def __init__(self, factor):
        super().__init__()
        self.inner, self.factor = Block(0.0), factor

    def forward(self, x):
        return self.factor * self.inner(x)


@pytest.mark.parametrize(("lag", "after"), [(0, 2), (2, 2), (2, 0)])
@pytest.mark.parametrize("name", RULES)
def test_values_that_leave_the_range_are_told_once_and_cost_no_gradient(name, lag, after, monkeypatch):
    monkeypatch.setitem(watch._LAG, "cpu", lag)
    factors, x = (1.0, 1.0, 1e6, 1.0, -1e6, 1.0, 1e9, *[1.0] * after), noise()
    model = rewired(name, Net(*map(Loud, factors)), x, exact=True).train()
    found = []
    for net in (kept(model), model):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            inner = x.clone().requires_grad_()
            loss(net(inner)).backward()
        found.append([inner.grad, *gradients(net)])
    assert equal(*found)
    assert len(told) == 1
    assert "the chain from (model)#0: values have left the range of its exact grid at (model)#" in str(
        told[0].message
    )


def test_the_answer_of_a_device_is_read_when_it_is_there(monkeypatch):
    answer, recorded = torch.tensor(False), []

    class Event:
        def record(self):
            recorded.append(self)

        def synchronize(self):
            answer.fill_(self in recorded)

    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(Event=Event))
    held = watch._on_host(SimpleNamespace(device=torch.device("cuda"), to=lambda *_, **__: answer))
    assert not answer
    assert held()


@pytest.mark.parametrize("lag", [0, 2])
def test_a_graph_that_is_dropped_is_freed_with_what_waits_to_be_looked_at(lag, monkeypatch):
    monkeypatch.setitem(watch._LAG, "cpu", lag)
    model = rewired("bdia", Trunk(6), noise(), exact=True).train()
    x = noise()
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as meter:
            out = model(x)
            assert meter.live > out.nbytes
            del out
            assert meter.live == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("coupling", "says"),
    [
        (revwire.Dr2Net(1, 0.1), "beta = 1, 1/2.*the nearest: 0.0625 or 0.125"),
        (revwire.Dr2Net(1, 3.0), "the nearest: 1$"),
        (revwire.Dr2Net(1, 1e-4), "the nearest: 0.00390625"),
        (revwire.Momentum(0.9), "gamma = 1.*the nearest: 0.5$"),
        (revwire.BDIA(0.3), "the nearest: 0.25 or 0.5"),
        (revwire.Coupling(-0.7, 1, 1), "the nearest: 0.5 or 1"),
    ],
)
def test_other_coefficients_are_refused_with_the_nearest(coupling, says):
    with pytest.raises(RewireError, match=says):
        revwire.rewire(Trunk(2), noise(), coupling=coupling, exact=True)
    nearest = [float(word) for word in says.split("nearest: ")[1].rstrip("$").split(" or ")]
    for value in nearest:
        if isinstance(coupling, revwire.BDIA | revwire.Momentum):
            dropped_bits(type(coupling)(value))
        elif isinstance(coupling, revwire.Dr2Net):
            dropped_bits(revwire.Dr2Net(1, value))


@pytest.mark.parametrize("bits", [101, -101, 1.5, "12"])
def test_grids_that_cannot_be(bits):
    with pytest.raises(RewireError, match="between -100 and 100 bits"):
        revwire.rewire(Trunk(2), noise(), exact=bits)


def test_a_given_grid_holds_for_every_chain_and_survives_a_copy():
    model = revwire.rewire(Trunk(3), noise(), coupling="bdia", exact=10)
    assert options_of(copy.deepcopy(model)).exact == Grid(10)
    assert plan_of(model).exact == 10
    assert not isinstance(plan_of(model).exact, bool)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, a: seen.append(a[0].detach().clone()))
    model.train()(noise())
    assert torch.equal(seen[0] * 2**10, (seen[0] * 2**10).round())


@pytest.mark.parametrize("name", RULES)
def test_second_order_and_retained_graphs(name):
    x = noise(dtype=torch.float64)
    model = rewired(name, Trunk(4, dropout=0.0).double(), x, exact=True).train()
    found = []
    for net in (kept(model), model):
        torch.manual_seed(0)
        inner = x.clone().requires_grad_()
        out = loss(net(inner))
        (once,) = torch.autograd.grad(out, inner, create_graph=True)
        again = torch.autograd.grad(out, inner, retain_graph=True)[0]
        once.square().sum().backward()
        found.append([once.detach(), again, inner.grad, *gradients(net)])
    assert equal(*found)
    assert found[0][2].norm() > 0
