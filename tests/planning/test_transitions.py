"""Children that a frame calls one after the other between chains: they run again as one, from the first one's input."""

import copy
import pickle
from dataclasses import replace
from enum import Enum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import ReplayError, RewireError
from revwire.measure.step import LiveBytes
from revwire.planning.plan import Joined
from revwire.rewrite.program import PROGRAM
from tests.helpers.couplings import kept
from tests.helpers.nets import Residual, assert_same, gradients, loss, recur

CHANNELS = 6


def block():
    return Residual(conv(), nn.BatchNorm2d(CHANNELS), nn.Tanh())


class Net(nn.Module):
    """A stem of siblings, as ResNets have: the frame that calls them has no residual of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.act1, self.drop1, self.maxpool = nn.ReLU(inplace=True), nn.Dropout(dropout), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(*(block() for _ in range(3)))
        self.bn2, self.act2, self.pool = nn.BatchNorm2d(CHANNELS), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(CHANNELS, 3)

    def stem(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        self.act1(x)  # as people use it: the old name means the changed tensor
        return self.maxpool(self.drop1(x))

    def tail(self, x):
        return self.head(self.pool(self.act2(self.bn2(x))).flatten(1))

    def forward(self, x, bias=None):
        x = self.stem(x)
        x = self.blocks(x if bias is None else x + bias)
        return self.tail(x)


class ByHand(nn.Module):
    """The recurrence of `Net` in plain autograd."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.tail(recur(self.net.stem(x), [b.body for b in self.net.blocks]))


STEM, TAIL = "conv1+bn1+act1+drop1+maxpool", "bn2+act2+pool"


def net(dropout=0.0):
    torch.manual_seed(0)
    return Net(dropout).double()


def x_of(batch=4, size=8):
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rewired(model, x=None, **options):
    return revwire.rewire(model, x_of() if x is None else x, transitions="checkpoint", **options)


def results(model, x, *args):
    torch.manual_seed(1)
    model.zero_grad()
    value = loss(model(x, *args))
    value.backward()
    found = [value.detach(), *gradients(model), *(b.clone() for b in model.buffers()), torch.rand(1)]
    return [x.grad, *found] if x.requires_grad else found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("image_wants_grad", [True, False])
def test_gradients_and_statistics_are_those_of_plain_autograd(training, image_wants_grad):
    model = rewired(net(0.3))
    assert [run.name for run in revwire.plan_of(model).joined] == [STEM, TAIL]
    plain = ByHand(net(0.3)).train(training)
    given = [x_of().requires_grad_(image_wants_grad) for _ in range(2)]
    assert_same(results(plain, given[0]), results(model.train(training), given[1]))


_ACTS = st.sampled_from(["relu", "relu_", "silu_", "tanh", "leaky_"])
_PARTS = st.one_of(_ACTS, st.sampled_from(["conv", "bn", "gn", "drop", "drop_", "identity", "max", "block"]))


def conv(channels=CHANNELS):
    return nn.Conv2d(channels, CHANNELS, 3, padding=1, bias=False)  # whose gradient before a norm is noise


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
    assert_same(results(kept(model), x_of()), results(model, x_of()), tolerance=1e-9)


def test_what_is_one_operation_or_changes_its_input_stays():
    def joined(*stem):
        model = nn.Sequential(nn.Sequential(*stem), *(block() for _ in range(3)), nn.Flatten())
        model[0].append(block())
        model[0].append(block())
        return [run.name for run in revwire.plan(model, x_of().float(), transitions="checkpoint").joined]

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
    value = loss(model(x_of()))
    assert fired == [True]
    value.backward()
    assert fired == [True, True]  # in the second run too
    hook.remove()
    plain = ByHand(net())
    model.act1, plain.net.act1 = nn.LeakyReLU(0.3, inplace=True), nn.LeakyReLU(0.3, inplace=True)
    model.load_state_dict(plain.net.state_dict())
    assert_same(results(plain, x_of()), results(model, x_of()))


def test_backward_twice_and_gradients_of_gradients():
    plain, model = ByHand(net().eval()), rewired(net()).eval()
    found = []
    for each in (plain, model):
        x = x_of().requires_grad_()
        value = loss(each(x))
        first = torch.autograd.grad(value, [x, *each.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [x], retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(value, [x, *each.parameters()])])
    assert_same(*found, tolerance=1e-9)


def test_images_changed_before_backward_are_found_out():
    model, images = rewired(net()), x_of()
    value = loss(model(images))
    images.add_(1)
    with pytest.raises(ReplayError, match=r"conv1\+bn1.*its input has been modified"):
        value.backward()


def test_copies_pickles_and_the_way_back():
    model = rewired(net(0.3))
    wanted = results(copy.deepcopy(model), x_of())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(wanted, results(duplicate, x_of()), tolerance=0)
        assert held(duplicate) == held(model)
    classes = [type(module) for module in net().modules()]
    original = revwire.unwire(model)
    original.load_state_dict(net().state_dict())
    assert [type(module) for module in original.modules()] == classes
    assert_same(results(net(0.3), x_of()), results(original, x_of()), tolerance=0)


def held(model, *args, images=None):
    """Bytes held between forward and backward, beside the images."""
    images = x_of(16) if images is None else images
    model(images, *args)  # traces what it has to
    with LiveBytes() as meter:
        value = loss(model(images, *args))
        found = meter.live
        value.backward()
    return found


def test_the_bytes_of_a_stem_are_gone():
    without, images = revwire.rewire(net(), x_of()), x_of(16)
    model = rewired(net())
    one = 16 * CHANNELS * 8 * 8 * 8  # float64 at full resolution: what conv1, bn1 and act1 make
    # conv's output and the activation's, maxpool's indices; the tail keeps the chain's pair and no merged trunk
    assert held(without, images=images) - held(model, images=images) > 2 * one


@pytest.mark.parametrize("first", [None, torch.ones(1, dtype=torch.float64)])
def test_another_way_of_calling_is_joined_when_it_comes(first):
    example = x_of() if first is None else (x_of(), first)
    model, bias = rewired(net(), example), torch.ones(1, dtype=torch.float64)
    assert abs(held(model, bias) - held(model)) < 16 * CHANNELS * 8 * 8 * 8
    assert len(model.__dict__[PROGRAM]._variants) == 2
    assert_same(results(kept(model), x_of(), bias), results(model, x_of(), bias))


def test_a_setting_changed_afterwards_counts():
    class Setting(Net):
        def __init__(self):
            super().__init__()
            self.gain = 1.0

        def forward(self, x):
            return super().forward(x) * self.gain

    model = rewired(Setting().double()).eval()
    before, model.gain = model(x_of()), 3.0
    assert_same([3 * before], [model(x_of())])


class Scaled(Net):
    """Settings of every kind that a forward may read: its own number, a list, an enum's, and a helper's."""

    def __init__(self):
        super().__init__()
        self.gain, self.scales, self.mode, self.steps = 1.0, [1.0, 1.0], Mode.ONCE, 0

    def forward(self, x):
        out = super().forward(x)
        if self.checked and bool((out > 1e9).any()):
            raise ValueError("too large")
        return self.scaled(out)

    def scaled(self, x):
        return x * self.gain * self.scales[1] * (2 if self.mode is Mode.TWICE else 1)

    checked = False

    def advance(self):
        self.steps += 1


class Mode(Enum):
    ONCE = 1
    TWICE = 2


def test_settings_of_every_kind_count():
    model = rewired(Scaled().double()).eval()
    wanted = model(x_of())
    for change, factor in (
        (lambda: setattr(model, "gain", 3.0), 3),
        (lambda: setattr(model, "scales", [1.0, 2.0]), 6),
        (lambda: model.scales.__setitem__(1, 4.0), 12),
        (lambda: setattr(model, "mode", Mode.TWICE), 24),
        (lambda: setattr(model, "gain", 1.0), 8),
    ):
        change()
        assert_same([factor * wanted], [model(x_of())])


def test_what_forward_does_not_read_may_change_at_every_step():
    model = rewired(Scaled().double())
    for _ in range(5):
        model.advance()
        loss(model(x_of())).backward()
    # one more than at first: train mode
    assert len(model.__dict__[PROGRAM]._variants) <= 2


def test_a_setting_that_cannot_be_traced_stands_alone():
    """What was refused is that way of running, not the ones to come."""
    model = rewired(Scaled().double()).eval()
    wanted = model(x_of())
    model.checked = True
    with pytest.warns(UserWarning, match="cannot be rewired"):
        model(x_of())
    model.checked, model.gain = False, 3.0
    before = len(model.__dict__[PROGRAM]._variants)
    assert_same([3 * wanted], [model(x_of())])
    assert len(model.__dict__[PROGRAM]._variants) == before + 1


def test_what_runs_between_two_siblings_parts_them():
    """Random numbers are drawn in the order in which they always were."""

    class Drawing(Net):
        def stem(self, x):
            x = self.drop1(self.conv1(x))
            noise = torch.rand_like(x[:1])
            return self.maxpool(self.act1(self.bn1(x))) + noise.mean()

    torch.manual_seed(0)
    model = rewired(Drawing(dropout=0.5).double())
    assert_same(results(kept(model), x_of()), results(model, x_of()), tolerance=1e-9)


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
        each = rewire(Changing().double(), x_of())
        each.conv1.requires_grad_(False)  # its weight's gradient would need the images
        value = loss(each(x_of(), change=True))
        value.backward()
        found.append([p.grad for p in each.parameters()])
    assert_same(*found)


def test_a_plan_keeps_what_is_joined():
    plan = revwire.plan(net(), x_of(), transitions="checkpoint")
    assert plan.joined[0] == Joined("", ("conv1", "bn1", "act1", "drop1", "maxpool"))
    assert revwire.Plan.from_json(plan.to_json()) == plan
    assert f"run again in backward from their input: {STEM}, {TAIL}" in str(plan)
    model = revwire.rewire(net(), x_of(), plan=plan)
    assert held(model) == held(rewired(net()))
    for wrong in (Joined("", ("conv1", "act1")), Joined("nowhere", ("a", "b")), Joined("blocks", ("0", "1"))):
        with pytest.raises(RewireError, match=r"are no modules beside the chains that .* calls in a row"):
            revwire.rewire(net(), x_of(), plan=replace(plan, joined=(wrong,)))
    with pytest.raises(RewireError, match="not a plan"):
        revwire.Plan.from_dict({**plan.to_dict(), "joined": [{"module": "", "steps": []}]})


def test_verify_takes_it():
    report = revwire.verify(rewired(net(0.2).float(), x_of().float()), x_of().float())
    assert report.ok, report
