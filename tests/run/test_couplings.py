"""Couplings: each one's recurrence, what it keeps of the network, names and noise."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import revwire
from revwire import RewireError
from revwire.measure.drift import drifts
from revwire.rewrite.schedule import set_coupling
from revwire.rewrite.wired import with_options
from revwire.run.coupling import Original, coupling_of
from revwire.run.options import Options
from tests.helpers import couplings
from tests.helpers.couplings import RULES, Trunk, noise, rewired
from tests.helpers.nets import NETS, assert_same, gradients, loss, x_of
from tests.helpers.steps import kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_output_gradients_and_draws_are_those_of_the_recurrence(name, training):
    if name == "bdia" and not training:
        pytest.skip("is the network itself in eval mode")
    net = Trunk(6).double().train(training)
    x = noise(dtype=torch.float64)
    plain = copy.deepcopy(net)
    model = rewired(name, net, x).train(training)
    found = []
    for run in (lambda y: couplings.reference(name, plain.blocks, y)[1], model):
        torch.manual_seed(1)
        inner = x.clone().requires_grad_()
        out = run(inner)
        loss(out).backward()
        found.append([out, inner.grad, *gradients(plain if run is not model else model), torch.rand(1)])
    assert_same(*found, tolerance=1e-9)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("coupling", [revwire.BDIA(), revwire.Momentum(0), revwire.Dr2Net(1, 0)])
def test_the_networks_function_is_kept_to_the_bit(name, coupling):
    kind = NETS[name]
    net, x = kind.build(dropout=0.1).float().eval(), kind.input().float()
    wanted = net(x)
    model = with_options(revwire.rewire(copy.deepcopy(net), x), Options(coupling))
    found = model.eval()(x)
    assert torch.equal(wanted, found)
    gradients_of = [
        torch.autograd.grad(loss(out), list(m.parameters()), allow_unused=True)
        for out, m in ((wanted, net), (found, model))
    ]
    assert all(torch.equal(w, f) for w, f in zip(*gradients_of, strict=True) if w is not None)


@pytest.mark.parametrize("name", NETS)
def test_dr2net_tends_to_the_network_as_beta_vanishes(name):
    kind = NETS[name]
    net, x = kind.build().eval(), kind.input()
    wanted = net(x)
    model = revwire.rewire(copy.deepcopy(net), x).eval()
    distances = []
    for beta in (1e-3, 1e-6, 1e-9):
        set_coupling(model, revwire.Dr2Net(1, beta))
        distances.append(float((model(x) - wanted).detach().abs().max() / wanted.detach().abs().max()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6


def test_bdia_draws_both_signs_per_sample_and_step_and_averages_to_the_network():
    net = Trunk(2, dropout=0.0).double()
    for (
        block
    ) in net.blocks:  # branches that do not depend on the trunk, so that the mean is the network's to the end
        block.body[0].weight.data.zero_()
        block.body[0].bias.data.normal_()
    x = noise(batch=4000, dtype=torch.float64)
    wanted = net(x)
    torch.manual_seed(0)
    found = rewired("bdia", net, x).train()(x)
    scale = (wanted - x).abs().mean()
    off = (found - wanted).flatten(1)
    assert 0.4 < (off[:, 0] > 0).double().mean() < 0.6
    assert off.abs().min() > 1e-3 * scale  # every sample was moved
    assert off.mean(0).abs().max() < 0.05 * off.abs().mean(0).max()


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_what_bdia_draws_for_a_sample_goes_with_it_into_its_slice(chunks):
    """Also where slices are of different lengths; against the recurrence by hand, which knows of no slices."""
    net, x = Trunk(4, dropout=0.0).double(), noise(5, dtype=torch.float64)
    plain = copy.deepcopy(net)
    model = revwire.rewire(net, x, coupling="bdia", chunks=chunks).train()
    assert all(step.slices == chunks for step in revwire.plan_of(model).steps)
    found = []
    for run in (lambda y: couplings.reference("bdia", plain.blocks, y)[1], model):
        torch.manual_seed(1)
        inner = x.clone().requires_grad_()
        loss(run(inner)).backward()
        found.append([inner.grad, *gradients(plain if run is not model else model)])
    assert_same(*found)


def test_bdia_runs_plainly_in_a_frozen_block_of_a_model_in_training():
    net = Trunk(4, dropout=0.0).double()
    x = noise(dtype=torch.float64)
    model = with_options(revwire.rewire(copy.deepcopy(net), x), Options(revwire.BDIA()))
    model.train()
    assert not torch.equal(model(x), net(x))
    model.training = False  # the frame of the loop is the model's own
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("re2tal", revwire.Re2TAL()),
        ("BDIA", revwire.BDIA(0.5)),
        ("bdia(gamma=0.25)", revwire.BDIA(0.25)),
        (" dr2net( alpha = 1 , beta=1e-1 ) ", revwire.Dr2Net(1, 0.1)),
        ("dr2net(beta=0.5)", revwire.Dr2Net(1, 0.5)),
        ("momentum(gamma=0.9)", revwire.Momentum(0.9)),
        ("coupling(a=-1,b=1.5,c=2)", revwire.Coupling(-1, 1.5, 2)),
    ],
)
def test_names_and_specs(text, wanted):
    assert coupling_of(text) == wanted
    assert coupling_of(wanted.spec) == wanted
    assert pickle.loads(pickle.dumps(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("retal", "unknown coupling 'retal'; known: re2tal, dr2net, momentum, bdia, coupling"),
        ("dr2net(gamma=1)", "cannot read 'gamma=1'.*alpha=NUMBER,beta=NUMBER"),
        ("dr2net(alpha=1", "unknown coupling"),
        ("re2tal(a=1)", "coefficients it takes: none"),
        ("bdia(gamma=0.5,gamma=0.5)", "cannot read 'gamma=0.5'"),
        ("bdia(gamma=1e999)", "0 < gamma < 1"),
        ("bdia(gamma=--1)", "cannot read"),
        ("coupling(a=1)", "needs all of a, b, c"),
        ("dr2net(alpha=0.5,beta=0)", "with a = 0.*choose beta other than 0"),
        ("momentum(gamma=1)", "0 <= gamma < 1"),
        ("coupling(a=1,b=0,c=0)", "c not 0"),
    ],
)
def test_specs_that_make_no_coupling(text, says):
    with pytest.raises(RewireError, match=says):
        coupling_of(text)


@pytest.mark.parametrize(
    ("coupling", "noise"),
    [
        (revwire.Re2TAL(), 1),
        (revwire.Dr2Net(1, 0.1), 10.9),
        (revwire.Dr2Net(1, 0.5), 1 + math.sqrt(3)),
        (revwire.Dr2Net(0.1, 0.9), 1.11),
        (revwire.BDIA(), 2),
        (revwire.Momentum(0.9), 1 / 0.9),
        (Original(), math.inf),
    ],
)
def test_noise_of_the_inverse(coupling, noise):
    assert coupling.noise == pytest.approx(noise, rel=5e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5), st.integers(0, 2**31))
def test_noise_is_what_a_disturbance_grows_by(b, a, seed):
    if abs(a) < 1e-2:
        return
    coupling = revwire.Coupling(a, b, 1.0)
    state = x_of(2, seed=seed).tolist()
    log = 0.0
    for _ in range(3000):  # without branches: x[i-1] = (x[i+1] - b x[i]) / a
        state = [(state[1] - b * state[0]) / a, state[0]]
        size = max(map(abs, state))
        log, state = log + math.log(size), [s / size for s in state]
    found = math.exp(log / 3000)
    assert max(found, 1.0) == pytest.approx(coupling.noise, rel=0.02)


@pytest.mark.parametrize("name", ["momentum", "bdia"])
def test_the_warnings_estimate_is_right_within_a_factor_of_four(name):
    x = noise()
    for depth in (10, 14):
        net = Trunk(depth, dropout=0.0)
        replayed = rewired(name, net, x)
        found = []
        for model in (kept(replayed), replayed):
            torch.manual_seed(0)
            loss(model(x)).backward()
            found.append(torch.cat([g.flatten() for g in gradients(model)]))
        error = float((found[0] - found[1]).norm() / found[0].norm())
        estimate = 2.0**-24 * RULES[name][0].noise ** depth
        assert estimate / 16 < error < 4 * estimate


def test_streams_stay_float32_under_autocast_and_bf16_ones_would_have_cost():
    """The recurrence by hand with bfloat16 streams loses its input; ours, under autocast to bfloat16, does not."""
    net, x = Trunk(24, dropout=0.0), noise()
    truth = kept(rewired("re2tal", copy.deepcopy(net).double(), x.double()))
    loss(truth(x.double())).backward()
    replayed = rewired("re2tal", copy.deepcopy(net), x)
    errors = []
    for model in (kept(replayed), replayed):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.float32
        loss(out).backward()
        errors.append(_error(truth, model))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    (drift,) = drifts(model, Options(revwire.Re2TAL()), revwire.plan(Trunk(24), x), (x,), {}).chains
    previous = current = x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for block in net.blocks:
            previous, current = current, previous + block(current).bfloat16()
        for block in reversed(net.blocks):
            previous, current = current - block(previous).bfloat16(), previous
    narrow = float((current.float() - x.bfloat16().float()).abs().max() / x.abs().max())
    assert narrow > 1000 * drift.bfloat16


def _error(truth, model):
    pairs = zip(gradients(truth), gradients(model), strict=True)
    difference = sum(float((t - f.double()).square().sum()) for t, f in pairs)
    return math.sqrt(difference / sum(float(t.square().sum()) for t in gradients(truth)))
