"""Children that a frame calls one after the other between chains: they run again as one, from the first one's input."""

import copy
import functools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import ReplayError, RewireError
from revwire.planning.plan import Joined
from tests.helpers import steps
from tests.helpers.nets import assert_same, loss
from tests.helpers.stems import CHANNELS, STEM, TAIL, ByHand, Net, block, conv, net, noise, rewired
from tests.helpers.steps import kept
from tests.helpers.variants import variants

results = functools.partial(steps.results, of_input=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("image_wants_grad", [True, False])
def test_gradients_and_statistics_are_those_of_plain_autograd(training, image_wants_grad):
    model = rewired(net(0.3))
    assert [run.name for run in revwire.plan_of(model).joined] == [STEM, TAIL]
    plain = ByHand(net(0.3)).train(training)
    found = (steps.results(m, noise(), of_input=image_wants_grad) for m in (plain, model.train(training)))
    assert_same(*found)


_ACTS = st.sampled_from(["relu", "relu_", "silu_", "tanh", "leaky_"])
_PARTS = st.one_of(_ACTS, st.sampled_from(["conv", "bn", "gn", "drop", "drop_", "identity", "max", "block"]))


def part(kind):
    makes = {
        "relu": nn.ReLU,
        "relu_": lambda: nn.ReLU(inplace=True),
        "silu_": lambda: nn.SiLU(inplace=True),
        "tanh": nn.Tanh,
        "leaky_": lambda: nn.LeakyReLU(0.1, inplace=True),
        "conv": conv,
        "bn": lambda: nn.BatchNorm2d(CHANNELS),
        "gn": lambda: nn.GroupNorm(2, CHANNELS),
        "drop": lambda: nn.Dropout(0.3),
        "drop_": lambda: nn.Dropout(0.3, inplace=True),
        "identity": nn.Identity,
        "max": lambda: nn.MaxPool2d(3, 1, 1),
        "block": lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)
        ),
    }
    return makes[kind]()


@settings(max_examples=25)
@given(
    stem=st.lists(_PARTS, max_size=5),
    tail=st.lists(_PARTS, max_size=4),
    training=st.booleans(),
)
def test_no_stem_changes_a_gradient(stem, tail, training):
    torch.manual_seed(0)
    # an activation in place on a saved output (tanh then relu_) is autograd's own error: a conv stands between
    stem, tail = ([m for kind in kinds for m in (conv(), part(kind))] for kinds in (stem, tail))
    model = nn.Sequential(conv(3), *stem, conv(), *(block() for _ in range(3)), *tail).double()
    model = rewired(model).train(training)
    assert_same(results(kept(model), noise()), results(model, noise()), tolerance=1e-9)


def test_what_is_one_operation_or_changes_its_input_stays():
    def joined(*stem):
        model = nn.Sequential(nn.Sequential(*stem), *(block() for _ in range(3)), nn.Flatten())
        model[0].append(block())
        model[0].append(block())
        return [run.name for run in revwire.plan(model, noise().float(), transitions="checkpoint").joined]

    first, bn = conv(3), nn.BatchNorm2d(CHANNELS)
    assert joined(first) == []
    assert joined(nn.Identity(), first, nn.Identity()) == []
    assert joined(nn.Dropout(0.1), first) == []  # a dropout holds its mask alone
    assert joined(first, bn) == ["0.0+0.1"]
    assert joined(nn.ReLU(inplace=True), first, bn) == ["0.1+0.2"]  # the images would be changed
    assert joined(nn.Dropout(0.1, inplace=True), first, bn) == ["0.1+0.2"]
    # one module of several operations goes with the single ones around it, the next one runs on its own
    deep = [nn.Sequential(nn.Conv2d(n, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)) for n in (3, CHANNELS)]
    assert joined(deep[0], nn.ReLU(), deep[1], bn) == ["0.0+0.1", "0.2+0.3"]


def test_what_is_given_changed_in_training_alone_is_not_run_again():
    """torchvision's classifiers begin with a dropout in place: of the pooled features, which the frame holds."""
    model = nn.Sequential(block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(CHANNELS, CHANNELS), nn.ReLU()))
    x = torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64)
    model = rewired(model.double(), x).train()
    assert "4" not in revwire.plan_of(model).recomputed
    assert_same(results(kept(model), x), results(model, x))


def test_hooks_fire_and_children_are_looked_up():
    model, fired = rewired(net()), []
    hook = model.bn1.register_forward_hook(lambda *_: fired.append(torch.is_grad_enabled()))
    value = loss(model(noise()))
    assert fired == [True]
    value.backward()
    assert fired == [True, True]  # in the second run too
    hook.remove()
    plain = ByHand(net())
    model.act1, plain.net.act1 = nn.LeakyReLU(0.3, inplace=True), nn.LeakyReLU(0.3, inplace=True)
    model.load_state_dict(plain.net.state_dict())
    assert_same(results(plain, noise()), results(model, noise()))


def test_backward_twice_and_gradients_of_gradients():
    plain, model = ByHand(net().eval()), rewired(net()).eval()
    found = []
    for each in (plain, model):
        x = noise().requires_grad_()
        value = loss(each(x))
        first = torch.autograd.grad(value, [x, *each.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [x], retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(value, [x, *each.parameters()])])
    assert_same(*found, tolerance=1e-9)


def test_images_changed_before_backward_are_found_out():
    model, images = rewired(net()), noise()
    value = loss(model(images))
    images.add_(1)
    with pytest.raises(ReplayError, match=r"conv1\+bn1.*its input has been modified"):
        value.backward()


def test_copies_pickles_and_the_way_back():
    model = rewired(net(0.3))
    wanted = results(copy.deepcopy(model), noise())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(wanted, results(duplicate, noise()), tolerance=0)
        assert held(duplicate) == held(model)
    classes = [type(module) for module in net().modules()]
    original = revwire.unwire(model)
    original.load_state_dict(net().state_dict())
    assert [type(module) for module in original.modules()] == classes
    assert_same(results(net(0.3), noise()), results(original, noise()), tolerance=0)


def held(model, *args):
    """Bytes held between forward and backward, beside the images."""
    return steps.held(model, noise(16), *args)[0]


def test_the_bytes_of_a_stem_are_gone():
    without, model = revwire.rewire(net(), noise()), rewired(net())
    one = 16 * CHANNELS * 8 * 8 * 8  # float64 at full resolution: what conv1, bn1 and act1 make
    # conv's output and the activation's, maxpool's indices; the tail keeps the chain's pair and no merged trunk
    assert held(without) - held(model) > 2 * one


@pytest.mark.parametrize("first", [None, torch.ones(1, dtype=torch.float64)])
def test_another_way_of_calling_is_joined_when_it_comes(first):
    example = noise() if first is None else (noise(), first)
    model, bias = rewired(Net().double(), example), torch.ones(1, dtype=torch.float64)
    known = sum(variants(model))
    assert abs(held(model, bias) - held(model)) < 16 * CHANNELS * 8 * 8 * 8
    assert sum(variants(model)) == known + 1
    assert_same(results(kept(model), noise(), bias), results(model, noise(), bias))


def test_what_runs_between_two_siblings_parts_them():
    """Random numbers are drawn in the order in which they always were."""

    class Drawing(Net):
        def stem(self, x):
            x = self.drop1(self.conv1(x))
            drawn = torch.rand_like(x[:1])
            return self.maxpool(self.act1(self.bn1(x))) + drawn.mean()

    torch.manual_seed(0)
    model = rewired(Drawing(dropout=0.5).double())
    assert_same(results(kept(model), noise()), results(model, noise()), tolerance=1e-9)


def test_a_call_that_changes_what_enters_runs_as_before():
    class Changing(Net):
        def forward(self, x, *, change=False):
            y = self.maxpool(self.act1(self.bn1(self.conv1(x))))
            if change:
                x.add_(1)
            return self.tail(self.blocks(y))

    found = []
    for rewire in (revwire.rewire, rewired):
        torch.manual_seed(0)
        each = rewire(Changing().double(), noise())
        each.conv1.requires_grad_(False)  # its weight's gradient would need the images
        value = loss(each(noise(), change=True))
        value.backward()
        found.append([p.grad for p in each.parameters()])
    assert_same(*found)


def test_a_plan_keeps_what_is_joined():
    plan = revwire.plan(net(), noise(), transitions="checkpoint")
    assert plan.joined[0] == Joined("", ("conv1", "bn1", "act1", "drop1", "maxpool"))
    assert revwire.Plan.from_json(plan.to_json()) == plan
    assert f"run again in backward from their input: {STEM}, {TAIL}" in str(plan)
    model = revwire.rewire(net(), noise(), plan=plan)
    assert held(model) == held(rewired(net()))
    for wrong in (Joined("", ("conv1", "act1")), Joined("nowhere", ("a", "b")), Joined("blocks", ("0", "1"))):
        with pytest.raises(RewireError, match=r"are no modules beside the chains that .* calls in a row"):
            revwire.rewire(net(), noise(), plan=replace(plan, joined=(wrong,)))
    with pytest.raises(RewireError, match="not a plan"):
        revwire.Plan.from_dict({**plan.to_dict(), "joined": [{"module": "", "steps": []}]})


def test_verify_takes_it():
    report = revwire.verify(rewired(net(0.2).float(), noise().float()), noise().float())
    assert report.ok, report
