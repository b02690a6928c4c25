"""The dials: slices, kept graphs, anchors, transitions; none of them changes a number."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import RewireError
from tests.helpers.branches import Net
from tests.helpers.nets import WIDTH, assert_same, loss
from tests.helpers.steps import kept, results
from tests.helpers.transformer import DEPTH, net, noise

_MODES = st.lists(st.sampled_from(["reverse", "anchor", "keep"]), min_size=4 * DEPTH, max_size=4 * DEPTH)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    modes=_MODES,
    chunks=st.integers(1, 6),
    batch=st.integers(1, 5),
    transitions=st.sampled_from(["keep", "checkpoint"]),
    coupling=st.sampled_from(["re2tal", "bdia", "momentum"]),
    exact=st.booleans(),
    training=st.booleans(),
)
def test_no_dial_changes_a_gradient(modes, chunks, batch, transitions, coupling, exact, training):
    x = noise(batch)
    model = net().train(training)
    names = [step.name for step in revwire.plan(model, noise(2)).steps]
    of = {mode: [n for n, m in zip(names, modes, strict=True) if m == mode] for mode in ("anchor", "keep")}
    model = revwire.rewire(
        model, noise(2), coupling=coupling, exact=exact, chunks=chunks, transitions=transitions, **of
    )
    # slices draw their own dropout masks, so the same slices are compared, with everything kept for backward
    assert_same(results(kept(model), x), results(model, x), tolerance=0 if exact else 1e-9)


@pytest.mark.parametrize(
    "dials", [{"chunks": 3}, {"anchor": "*"}, {"keep": 2}, {"transitions": "checkpoint"}]
)
def test_autograd_at_large(dials):
    x = noise()
    plain, model = revwire.rewire(net(), x), revwire.rewire(net(), x, **dials)
    plain.eval()
    model.eval()
    found = []
    for each in (plain, model):
        inner = x.clone().requires_grad_()
        value = loss(each(inner))
        (first,) = torch.autograd.grad(value, inner, create_graph=True)
        second = torch.autograd.grad(
            first.square().sum(), [inner, *each.first.parameters()], retain_graph=True
        )
        again = torch.autograd.grad(value, inner)
        found.append([first, *second, *again])
    assert_same(*found, tolerance=1e-9)
    duplicate = pickle.loads(pickle.dumps(model))
    assert_same(results(model, x), results(duplicate, x), tolerance=0)


def test_unwire_takes_the_transitions_back():
    model, x = net(), noise()
    classes = [type(module) for module in model.modules()]
    wanted = results(model, x)
    model = net()
    revwire.unwire(revwire.rewire(model, x, chunks=2, transitions="checkpoint", keep=1))
    assert [type(module) for module in model.modules()] == classes
    assert_same(wanted, results(model, x), tolerance=0)


def test_a_plan_keeps_its_dials():
    x = noise()
    plan = revwire.plan(
        net(),
        x,
        chunks={"*#1": 2, "first.0": 3},
        keep="second.1#1",
        anchor="*#0",
        transitions="checkpoint",
    )
    assert revwire.Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    assert "in 3 slices" in text
    assert "graph kept" in text
    assert "run again in backward from their input: norm+head, stem, down" in text
    model = revwire.rewire(net(), x, plan=plan)
    assert_same(results(kept(model), x), results(model, x), tolerance=1e-9)


def test_a_plan_from_elsewhere_is_proven_again():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    plain, mixing = (Net(*(layer(WIDTH, WIDTH) for _ in range(2))) for layer in (nn.Linear, Centred))
    x = torch.randn(4, 3, WIDTH)
    plan = revwire.plan(plain, x, chunks=2)
    revwire.rewire(copy.deepcopy(plain), x, plan=plan)
    with pytest.raises(RewireError, match="in slices, and here its slices do not come out"):
        revwire.rewire(mixing, x, plan=plan)
    for recomputed in (("nowhere",), ("layers",), ("",)):
        with pytest.raises(RewireError, match="no module beside the chains"):
            revwire.rewire(plain, x, plan=replace(plan, recomputed=recomputed))


def test_verify_takes_a_model_with_dials():
    x = noise().float()
    model = revwire.rewire(
        net().float(), x, chunks=2, keep="first.1", anchor="second.2", transitions="checkpoint"
    )
    report = revwire.verify(model, x)
    assert report.ok, report
    assert any("slices" in check.name for check in report.checks)


@pytest.mark.parametrize(
    ("dials", "says"),
    [
        ({"chunks": 0}, "at least 1"),
        ({"chunks": {"nowhere": 2}}, "no step matches 'nowhere'; steps are named first.0#0"),
        ({"keep": "nowhere"}, "keep: no step matches"),
        ({"anchor": "nowhere"}, "anchor: no step matches"),
        ({"keep": -1}, "at least 0"),
        ({"transitions": "drop"}, "one of keep, checkpoint"),
    ],
)
def test_dials_that_cannot_be(dials, says):
    with pytest.raises(RewireError, match=says):
        revwire.rewire(net(), noise(), **dials)
