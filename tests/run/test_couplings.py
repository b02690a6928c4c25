"""Couplings: each one's recurrence, what it keeps of the network, names, noise, and Dr2Net's schedule."""

import copy
import math
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import revwire
from revwire import RewireError
from revwire.measure.drift import drifts
from revwire.rewrite.program import Options
from revwire.rewrite.swap import options_of, set_coupling, with_options
from revwire.run.coupling import Original, coupling_of
from tests.helpers import couplings
from tests.helpers.couplings import RULES, WIDTH, Trunk, rewired
from tests.helpers.nets import NETS, assert_same, gradients, loss


def x_of(seed=0, batch=5, **kwargs):
    return torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(seed), **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_output_gradients_and_draws_are_those_of_the_recurrence(name, training):
    if name == "bdia" and not training:
        pytest.skip("is the network itself in eval mode")
    net = Trunk(6).double().train(training)
    x = x_of(dtype=torch.float64)
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
    x = x_of(batch=4000, dtype=torch.float64)
    wanted = net(x)
    torch.manual_seed(0)
    found = rewired("bdia", net, x).train()(x)
    scale = (wanted - x).abs().mean()
    off = (found - wanted).flatten(1)
    assert 0.4 < (off[:, 0] > 0).double().mean() < 0.6
    assert off.abs().min() > 1e-3 * scale  # every sample was moved
    assert off.mean(0).abs().max() < 0.05 * off.abs().mean(0).max()


def test_bdia_runs_plainly_in_a_frozen_block_of_a_model_in_training():
    net = Trunk(4, dropout=0.0).double()
    x = x_of(dtype=torch.float64)
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
    state = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    log = 0.0
    for _ in range(3000):  # without branches: x[i-1] = (x[i+1] - b x[i]) / a
        state = [(state[1] - b * state[0]) / a, state[0]]
        size = max(map(abs, state))
        log, state = log + math.log(size), [s / size for s in state]
    found = math.exp(log / 3000)
    assert max(found, 1.0) == pytest.approx(coupling.noise, rel=0.02)


def test_a_plan_warns_where_float32_would_not_carry_the_gradients():
    x, deep = x_of(), Trunk(24)
    (told,) = revwire.plan(deep, x, coupling="bdia").warnings
    assert "amplifies rounding errors 2 times a step; over 24 steps" in told
    assert "at most 14 steps" in told
    assert told in str(revwire.plan(deep, x, coupling="bdia")).replace("\n", " ")
    assert revwire.Plan.from_json(revwire.plan(deep, x, coupling="bdia").to_json()).warnings == (told,)
    assert not revwire.plan(deep, x, coupling="bdia", exact=True).warnings
    assert not revwire.plan(Trunk(12), x, coupling="bdia").warnings
    with pytest.warns(UserWarning, match="24 steps gradients of float32 streams would be wrong"):
        revwire.rewire(deep, x, coupling="bdia")
    with pytest.warns(UserWarning, match="not reversible, so it saves no memory"):
        revwire.rewire(Trunk(3), x, coupling=revwire.Momentum(0))


@pytest.mark.parametrize("name", ["momentum", "bdia"])
def test_the_warnings_estimate_is_right_within_a_factor_of_four(name):
    x = x_of()
    for depth in (10, 14):
        net = Trunk(depth, dropout=0.0)
        found = []
        for replay in (False, True):
            model = rewired(name, copy.deepcopy(net), x, replay=replay)
            torch.manual_seed(0)
            loss(model(x)).backward()
            found.append(torch.cat([g.flatten() for g in gradients(model)]))
        error = float((found[0] - found[1]).norm() / found[0].norm())
        estimate = 2.0**-24 * RULES[name][0].noise ** depth
        assert estimate / 16 < error < 4 * estimate


def test_schedule_moves_saves_and_goes_on():
    x = x_of()
    model = revwire.rewire(Trunk(3), x, coupling="dr2net")
    schedule = revwire.Dr2NetSchedule(model, 10, start=(0.875, 0.125), end=(0, 1))
    assert options_of(model).coupling == revwire.Dr2Net(0.875, 0.125)
    betas = []
    for i in range(12):
        assert options_of(model).coupling == schedule.coupling
        assert schedule.coupling.alpha + schedule.coupling.beta == pytest.approx(1)
        betas.append(schedule.coupling.beta)
        if i == 4:
            kept = schedule.state_dict()
        schedule.step()
    assert betas == sorted(betas)
    assert schedule.coupling == revwire.Dr2Net(0, 1)
    other = revwire.Dr2NetSchedule(model, 1)
    other.load_state_dict(kept)
    assert other.state_dict() == kept
    assert options_of(model).coupling == other.coupling
    assert other.coupling.beta == betas[4]


def test_an_exact_schedule_takes_powers_of_two():
    model = revwire.rewire(Trunk(3), x_of(), coupling="dr2net", exact=True)
    schedule = revwire.Dr2NetSchedule(model, 50, end=(0, 1))
    seen = []
    for _ in range(51):
        seen.append(schedule.coupling.beta)
        loss(model(x_of())).backward()
        schedule.step()
    assert sorted(set(seen)) == [0.125, 0.25, 0.5, 1.0]


def test_a_forward_in_flight_keeps_its_coefficients():
    x = x_of(dtype=torch.float64)
    net = Trunk(4, dropout=0.0).double()
    model = revwire.rewire(net, x, coupling="dr2net(alpha=0.5,beta=0.5)")
    schedule = revwire.Dr2NetSchedule(model, 1, start=(0.5, 0.5), end=(0.2, 0.8))
    wanted = []
    for coupling in (revwire.Dr2Net(0.5, 0.5), revwire.Dr2Net(0.2, 0.8)):
        copied = with_options(model, Options(coupling, replay=False))
        loss(copied(x)).backward()
        wanted.append(gradients(copied))
    first = model(x)
    schedule.step()
    second = model(x)
    loss(second).backward()
    assert_same(wanted[1], gradients(model))
    model.zero_grad()
    loss(first).backward()
    assert_same(wanted[0], gradients(model))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: revwire.Dr2NetSchedule(Trunk(2), 5), "not rewired; call revwire.rewire"),
        (lambda m: revwire.Dr2NetSchedule(revwire.rewire(Trunk(2), x_of()), 5), "rewired with re2tal"),
        (lambda m: revwire.Dr2NetSchedule(m, 0), "at least one step"),
        (lambda m: revwire.Dr2NetSchedule(m, 5, start=(1, 0)), "beta must be larger than 0"),
    ],
)
def test_schedules_that_cannot_be(make, says):
    model = revwire.rewire(Trunk(2), x_of(), coupling="dr2net")
    with pytest.raises(RewireError, match=says):
        make(model)


def test_coupling_and_grid_are_kept_in_a_checkpoint(tmp_path):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    revwire.rewire(model, torch.zeros(2, 3, 16, 16), coupling="dr2net", exact=12)
    revwire.Dr2NetSchedule(model, 2, end=(0.5, 0.5)).step()
    moved = options_of(model)
    assert moved.coupling != revwire.Dr2Net()
    revwire.save(model, tmp_path / "m.safetensors", arch="vit_tiny_patch16_224", model_args=sizes)
    loaded = revwire.load(tmp_path / "m.safetensors")
    assert options_of(loaded) == moved
    assert options_of(loaded).exact == revwire.Grid(12)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


class Own(revwire.Coupling):
    """Not among the named ones."""


def test_a_coupling_that_no_file_can_name_is_not_saved(tmp_path):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    revwire.rewire(model, torch.zeros(2, 3, 16, 16), coupling=Own(1, 0, 1))
    with pytest.raises(revwire.CheckpointError, match=r"use revwire.Coupling\(1, 0, 1\)"):
        revwire.save(model, tmp_path / "m.safetensors", arch="vit_tiny_patch16_224", model_args=sizes)


def test_a_plan_for_another_grid_is_refused():
    x = x_of()
    plan = revwire.plan(Trunk(2), x, exact=True)
    with pytest.raises(RewireError, match="pass exact=True"):
        revwire.rewire(Trunk(2), x, plan=plan)
    with pytest.raises(RewireError, match="pass exact=True"):
        revwire.rewire(Trunk(2), x, plan=plan, exact=1)
    assert revwire.Plan.from_json(plan.to_json()) == plan


def test_streams_stay_float32_under_autocast_and_bf16_ones_would_have_cost():
    """The recurrence by hand with bfloat16 streams loses its input; ours, under autocast to bfloat16, does not."""
    net, x = Trunk(24, dropout=0.0), x_of()
    truth = rewired("re2tal", copy.deepcopy(net).double(), x.double(), replay=False)
    loss(truth(x.double())).backward()
    errors = {}
    for replay in (False, True):
        model = rewired("re2tal", copy.deepcopy(net), x, replay=replay)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.float32
        loss(out).backward()
        errors[replay] = _error(truth, model)
    assert errors[True] == pytest.approx(errors[False], rel=1e-3)
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


def test_a_plan_prints_coefficients_and_exactness():
    told = " ".join(str(revwire.plan(Trunk(2), x_of(), coupling="bdia", exact=True)).split())
    assert "2 steps in 1 chain, coupling bdia(gamma=0.5), exact" in told
