"""Script modules and functions are operations: a branch may call them, and they run again as they ran."""

import warnings

import pytest
import torch
from torch import nn

import revwire
from revwire import RevwireError
from revwire.measure.live_bytes import LiveBytes
from tests.helpers.nets import Residual, assert_same, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]
WIDTH, DEPTH = 6, 4


def script(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(thing)


class Branch(nn.Module):
    def __init__(self, norm: bool, rate: float):
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(2 * WIDTH) if norm else nn.Identity()
        self.dropout = nn.Dropout(rate)

    def forward(self, x):
        y = self.wide(x)
        return self.dropout(self.narrow(torch.tanh(self.norm(y)) * torch.sigmoid(y)))


def net(norm=False, rate=0.0):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(Branch(norm, rate)) for _ in range(DEPTH))).double()


def scripted(model):
    for block in model:
        block.body = script(block.body)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "rate"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_a_scripted_child_has_the_gradients_of_the_one_that_was_scripted(when, training, norm, rate):
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    plain = revwire.rewire(net(norm, rate), x, keep="*").train(training)
    model = net(norm, rate)
    model = revwire.rewire(scripted(model), x) if when == "before" else scripted(revwire.rewire(model, x))
    model.train(training)
    for step in range(4):  # the first calls of a script module run other code than those that follow
        found = []
        for each in (plain, model):
            each.zero_grad()
            torch.manual_seed(step)
            each(x).square().sum().backward()
            found.append([*gradients(each), *(b.double() for b in each.buffers())])
        assert_same(*found)


class Counted(nn.Module):
    """Reads a buffer that it moves, which a norm in training does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1.0)
        return torch.tanh(self.linear(x)) * self.count.clone()


def test_a_scripted_childs_own_buffer_is_what_it_was_in_the_second_run():
    x, found = torch.randn(9, WIDTH, dtype=torch.float64), []
    for keep in ("*", None):
        torch.manual_seed(0)
        model = nn.Sequential(*(Residual(Counted()) for _ in range(DEPTH))).double()
        model = revwire.rewire(model if keep else scripted(model), x, keep=keep)
        for _ in range(2):
            (model(x) + model(2 * x)).square().sum().backward()
        found.append([*gradients(model), *model.buffers()])
    assert_same(*found)


def test_it_holds_nothing_for_backward():
    x = torch.randn(200, WIDTH)
    model = revwire.rewire(scripted(net().float()), x)
    model(x).sum().backward()
    with LiveBytes() as meter:
        loss = model(x).sum()
        assert meter.live < 4 * x.nbytes
    loss.backward()


def test_weights_that_change_are_found_out():
    x = torch.randn(9, WIDTH)
    model = revwire.rewire(scripted(net().float()), x)
    loss = model(x).sum()
    with torch.no_grad():
        next(model[1].parameters()).add_(1.0)
    with pytest.raises(revwire.ReplayError, match="changed in place"):
        loss.backward()


def test_verify_says_why_it_cannot():
    with pytest.raises(RevwireError, match=r"script modules.*before torch\.jit\.script"):
        revwire.verify(scripted(net().float()), torch.randn(9, WIDTH))


@script
def gated(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x * torch.sigmoid(scale * x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), 1.7

    def forward(self, x):
        return x + gated(self.linear(x), self.scale)


def test_a_scripted_function_is_an_operation_of_the_frame():
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated() for _ in range(DEPTH)))
    x = torch.randn(9, WIDTH)
    report = revwire.verify(model, x)
    assert report.ok, report
    function = gated
    revwire.rewire(model, x)
    assert gated is function
    model(x).sum().backward()
    assert [len(block._revwire_program._variants) for block in model] == [1] * DEPTH
    # another setting is another constant
    model[1].scale = 0.3
    other = nn.Sequential(*(Gated() for _ in range(DEPTH)))
    other.load_state_dict(model.state_dict())
    other[1].scale = 0.3
    torch.testing.assert_close(model(x), revwire.rewire(other, x)(x))
